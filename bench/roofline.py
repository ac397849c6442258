"""How near are decode and prefill to the roofline of this device?

    python bench/roofline.py [--device cuda:0] [--json FILE]

A model of a billion parameters in bfloat16 with random weights (on a CPU a tiny model). The
ceilings are measured: the bandwidth of a large copy within the device (bytes read and written), and
the speed of a large product of random matrices. `floor_ms` is the longer of two times: a step's
bytes at that bandwidth, and its operations at that speed (roofline model, Williams et al., CACM
2009).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import add_json_option, finish

# A billion parameters: a step is then bound by memory, not by kernel launches.
BILLION = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "head_dim": 64,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 32_000,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
TINY = "random:tiny-llama"
WARM_S = 0.3  # an idle GPU has lower clocks
CONTEXT = 512  # tokens of each decoding sequence


def seconds(device: str, run: Callable[[], Any], inner: int = 1, repeats: int = 7) -> float:
    """Median seconds of a call.

    Each repeat starts `inner` calls and synchronises once, so that launch and synchronisation do
    not dominate short calls.
    """
    import torch

    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    warm_until_s = time.perf_counter() + (WARM_S if device != "cpu" else 0.0)
    run()
    while time.perf_counter() < warm_until_s:
        run()
    took = []
    for _ in range(repeats):
        wait()
        started_s = time.perf_counter()
        for _ in range(inner):
            run()
        wait()
        took.append((time.perf_counter() - started_s) / inner)
    return statistics.median(took)


def copies(device: str) -> dict[str, float]:
    """GB/s of copies of 256 MiB within the device, to and from the host."""
    import torch

    on_gpu = device != "cpu"
    num_bytes = (256 if on_gpu else 16) << 20
    on_device = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(on_device)
    on_host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)

    def GBps(to: Any, source: Any, moved: int) -> float:
        took_s = seconds(device, lambda: to.copy_(source, non_blocking=on_gpu), 10 if on_gpu else 1)
        return round(moved * num_bytes / took_s / 1e9, 2)

    return {
        "within_device": GBps(other, on_device, 2),  # read and written
        "to_host": GBps(on_host, on_device, 1),
        "from_host": GBps(on_device, on_host, 1),
    }


def matrix_product(device: str) -> float:
    """Operations/s of a large product in bfloat16; of random numbers, because ones are faster."""
    import torch

    size = 8192 if device != "cpu" else 512
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(size, size, dtype=torch.bfloat16, device=device, generator=generator)
        for _ in range(2)
    )
    out = torch.empty_like(a)
    took_s = seconds(device, lambda: torch.mm(a, b, out=out), 10 if device != "cpu" else 1)
    return 2 * size**3 / took_s


class Steps:
    """Forward passes of any shape on one executor; all use the same blocks."""

    def __init__(self, device: str, folder: Path):
        from mellmpi.config import CacheConfig, ModelConfig
        from mellmpi.engine import build_executor
        from mellmpi.models import resolve

        model = TINY
        if device != "cpu":
            (folder / "config.json").write_text(json.dumps(BILLION))
            model = f"random:{folder / 'config.json'}"
        self.executor = build_executor(
            resolve(model, folder),
            ModelConfig(model=model),
            CacheConfig(kv_cache_memory_bytes=(4 if device != "cpu" else 1) << 30),
            device=device,
        )
        self.kv = self.executor.models[0].kv

    def plan(self, sequences: int, start: int, num_tokens: int) -> Any:
        from mellmpi.protocol import GREEDY, Chunk, StepPlan

        greedy = replace(GREEDY, max_tokens=9999)
        used = -(-(start + num_tokens) // self.kv.block_size)
        return StepPlan(
            self.kv.model,
            tuple(
                Chunk(
                    i,
                    start,
                    (7,) * num_tokens,
                    list(range(i * used, (i + 1) * used)),
                    greedy,
                    ((1,), []),
                )
                for i in range(sequences)
            ),
            (),
        )

    def work(self, sequences: int, start: int, num_tokens: int) -> tuple[float, float]:
        """The least (bytes, operations) of a step: weights and KV read once, KV written; products
        and attention. Only a sequence's last row needs the output projection."""
        a = self.executor.arch
        width = a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
        layers = a.num_layers * a.hidden_size * (width + 3 * a.intermediate_size)
        head = a.hidden_size * a.vocab_size
        positions = sequences * (start + num_tokens)
        num_bytes = 2 * (layers + head) + positions * self.kv.block_bytes / self.kv.block_size
        attended = sequences * num_tokens * (start + (num_tokens + 1) / 2)
        flops = 2 * sequences * (num_tokens * layers + head)
        flops += 4 * attended * a.num_layers * a.num_heads * a.head_dim
        return num_bytes, flops


def row(
    steps: Steps,
    device: str,
    ceilings: tuple[float, float],
    sequences: int,
    start: int,
    num_tokens: int,
) -> dict[str, Any]:
    """The time of a step, and its ratios to the ceilings, which are in bytes/s and operations/s."""
    plan = steps.plan(sequences, start, num_tokens)
    step_s = seconds(device, lambda: steps.executor.execute(plan))
    num_bytes, flops = steps.work(sequences, start, num_tokens)
    floor_s = max(num_bytes / ceilings[0], flops / ceilings[1])
    shape = {"decode": sequences} if start else {"prefill": num_tokens}
    return {
        **shape,
        "tokens_per_s": round(sequences * num_tokens / step_s, 1),
        "step_ms": round(1e3 * step_s, 3),
        "floor_ms": round(1e3 * floor_s, 4),
        "GBps": round(num_bytes / step_s / 1e9, 1),
        "TFLOPs": round(flops / step_s / 1e12, 3),
        "of_memory_bandwidth": round(num_bytes / step_s / ceilings[0], 4),
        "of_matrix_product": round(flops / step_s / ceilings[1], 4),
    }


def roofline(device: str) -> dict[str, Any]:
    ceilings = 1e9 * copies(device)["within_device"], matrix_product(device)
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(device, Path(folder))
        shapes = [*((n, CONTEXT - 1, 1) for n in (1, 8, 32)), (1, 0, 512), (1, 0, 2048)]
        rows = [row(steps, device, ceilings, *shape) for shape in shapes]
    return {
        "memory_GBps": round(ceilings[0] / 1e9, 1),
        "matrix_product_TFLOPs": round(ceilings[1] / 1e12, 2),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="default: cuda:0; cpu runs a tiny model")
    add_json_option(parser)
    args = parser.parse_args()
    from mellmpi.runtime.gpus import count_gpus

    if args.device != "cpu" and not count_gpus():
        print("no GPU here: nothing was measured; --device cpu runs a tiny model", file=sys.stderr)
        return
    finish({"device": args.device, "context": CONTEXT}, roofline(args.device), args.json)


if __name__ == "__main__":
    main()
