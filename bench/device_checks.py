"""Does everything that needs a GPU work on this one, and how near does it come to its limits?

    python bench/device_checks.py [--json FILE] [--model smollm2] [--only CHECK …]

One device, shared by three ranks; less than 8 minutes. Without a GPU it says so and ends with 0.
Every check is a process of its own with a time limit: one that fails says why, the others go on,
and the exit code is 1. `--rehearse` does all of it on the CPU, to see that it runs.

self_test   does this MPI move device buffers, values compared?
bandwidth   of every path between two ranks, against the device's own copies to and from the host
tokens      greedy, float32: the engine on the device against the reference on the CPU
migration   a batch under `--migrate stress` by two workers and a scheduler, against one worker
            that moves nothing: the same tokens?
roofline    decode against memory bandwidth, prefill against what a matrix product reaches
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import add_json_option, finish

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMITS_S = {"self_test": 70, "bandwidth": 60, "tokens": 80, "migration": 160, "roofline": 100}
CACHE = Path.home() / ".cache" / "mellmpi"
# A billion parameters: enough that a step reads memory rather than starting kernels.
BILLION = {
    "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
    "vocab_size": 32_000, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
TINY = "random:tiny-llama"


def launcher(num_ranks: int) -> list[str]:
    return ["bash", str(ROOT / "launch" / "mpirun.sh"), "-n", str(num_ranks), sys.executable]


def timed(device: str, run: Callable[[], Any], repeats: int = 7) -> float:
    """Median seconds of a call whose work is on the device."""
    import torch

    took = []
    for _ in range(repeats + 2):
        started_s = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started_s)
    return statistics.median(took[2:])


# --- checks: each returns plain data; "ok" says whether it holds ---------------------------------


def self_test(args: argparse.Namespace) -> dict[str, Any]:
    from mellmpi.transport.devices import device_buffers_work

    started_s = time.perf_counter()
    works = device_buffers_work(args.device)
    path = "by MPI, from device to device" if works else "through pinned host memory"
    return {"ok": True, "device_buffers_work": works, "path": path,
            "took_s": round(time.perf_counter() - started_s, 1)}  # fmt: skip


def copies(device: str) -> dict[str, float]:
    """GB/s of the device's own copies of 256 MiB."""
    import torch

    num_bytes = (256 if device != "cpu" else 16) << 20
    there = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(there)
    here = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=device != "cpu")
    speed = lambda run, moved: round(moved * num_bytes / timed(device, run) / 1e9, 2)  # noqa: E731
    return {
        "within_device": speed(lambda: other.copy_(there), 2),  # read and written
        "to_host": speed(lambda: here.copy_(there), 1),
        "from_host": speed(lambda: there.copy_(here), 1),
    }


def bandwidth(args: argparse.Namespace) -> dict[str, Any]:
    own = copies(args.device)
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        where = "cpu" if args.device == "cpu" else "cuda"
        subprocess.run(
            [*launcher(2), str(HERE / "bandwidth.py"), "-m", f"{16 << 20}:{64 << 20}", "-i", "9",
             "-d", where, "--json", output.name], check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        rows = json.loads(output.read())["results"]
    slowest = min(own["to_host"], own["from_host"])
    best = {
        path: max(row["MBps"] for row in rows if row["path"] == path) / 1e3
        for path in dict.fromkeys(row["path"] for row in rows)
    }
    shares = {path: round(GBps / slowest, 3) for path, GBps in best.items()}
    return {"ok": bool(rows), "copies_GBps": own, "rows": rows, "of_the_slower_copy": shares}


def answer(device: str, args: argparse.Namespace, prompts: list[list[int]], num_out: int,
           plain_torch: bool = False) -> list[list[int]]:  # fmt: skip
    """Greedy tokens in float32."""
    from mellmpi.config import BatchConfig, CacheConfig, ModelConfig
    from mellmpi.core.batch import BatchScheduler
    from mellmpi.engine.checkpoint import resolve
    from mellmpi.engine.executor import build_executor
    from mellmpi.protocol import SCHEDULER, Assign, Request, Sampling

    executor = build_executor(
        resolve(args.model, CACHE), ModelConfig(model=args.model, dtype="float32"),
        CacheConfig(kv_cache_memory_bytes=1 << 30), device=device, plain_torch=plain_torch,
    )  # fmt: skip
    batch = BatchScheduler(
        executor.models, executor.arena.num_blocks, 0, BatchConfig(), CacheConfig()
    )
    sampling = Sampling(num_out, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, (), None)
    name = executor.models[0].kv.model
    for i, prompt in enumerate(prompts):
        request = Request(i, name, tuple(prompt), sampling, None)
        batch.handle(SCHEDULER, Assign(request, i + 1, ()))
    found: list[list[int]] = [[] for _ in prompts]
    while (plan := batch.plan()) is not None:
        result = executor.execute(plan)
        sampled = [chunk.request_id for chunk in plan.chunks if chunk.sampling]
        for i, token in zip(sampled, result.tokens, strict=True):
            found[i].append(token)
        batch.commit(plan, result)
    executor.release()
    return found


def same_tokens(a: list[list[int]], b: list[list[int]]) -> dict[str, Any]:
    pairs = list(zip(a, b, strict=True))
    same = sum(x == y for one, two in pairs for x, y in zip(one, two, strict=False))
    return {
        "answers": len(pairs), "answers_alike": sum(one == two for one, two in pairs),
        "tokens": sum(len(one) for one in a), "tokens_alike": same,
    }  # fmt: skip


def tokens(args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(0)
    lengths = (5, 17, 64, 130, 300, 16, 33, 200)
    prompts = [[rng.randrange(3, 500) for _ in range(n)] for n in lengths]
    ours = answer(args.device, args, prompts, 32)
    alike = same_tokens(ours, answer("cpu", args, prompts, 32, plain_torch=True))
    # One near-tie may part an answer from there on; the first token depends on nothing before it.
    return {"ok": alike["answers_alike"] >= len(prompts) - 1, **alike}


def batch_run(args: argparse.Namespace, folder: Path, name: str, num_ranks: int,
              *flags: str) -> tuple[list[list[int]], dict[str, Any]]:  # fmt: skip
    """`run-batch` on the device: (answers in order, report)."""
    out, report = folder / f"{name}.jsonl", folder / f"{name}.json"
    device = "cpu" if args.device == "cpu" else "cuda"
    subprocess.run(
        [*launcher(num_ranks), "-m", "mellmpi", "run-batch", "-i", str(folder / "in.jsonl"), "-o",
         str(out), "--report", str(report), "--model", args.model, "--dtype", "float32",
         "--device", device, "--oversubscribe-gpus", "--gpu-memory-utilization", "0.3",
         "--kv-cache-memory-bytes", "256M", *flags],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    answers = {
        int(line["custom_id"]): line["response"]["body"]["choices"][0]["token_ids"]
        for line in lines
    }
    return [answers[i] for i in sorted(answers)], json.loads(report.read_text())


def migration(args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "in.jsonl", "w") as requests:
            for i in range(24):
                prompt = [rng.randrange(3, 250) for _ in range(rng.randint(20, 300))]
                body = {"prompt": prompt, "max_tokens": 150, "temperature": 0, "ignore_eos": True,
                        "return_token_ids": True}  # fmt: skip
                line = {"custom_id": str(i), "method": "POST", "url": "/v1/completions"}
                requests.write(json.dumps({**line, "body": body}) + "\n")
        still, _ = batch_run(args, folder, "still", 2, "--migrate", "never")
        moved, report = batch_run(args, folder, "moved", 3, "--migrate", "stress",
                                  "--policy", "worst_fit", "--checksums", "always")  # fmt: skip
    alike = same_tokens(still, moved)
    moves = report["migrations"]
    return {
        "ok": alike["answers_alike"] >= 0.9 * alike["answers"] and moves["transfer"] > 0, **alike,
        "migrations": moves, "downtime_ms": report.get("downtime_ms"),
        "tpot_ms": report.get("tpot_ms"),
    }  # fmt: skip


class Steps:
    """Forward passes of any shape over one executor, at the same place again and again."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        from mellmpi.config import CacheConfig, ModelConfig
        from mellmpi.engine.checkpoint import resolve
        from mellmpi.engine.executor import build_executor

        model = TINY
        if args.device != "cpu":
            (folder / "config.json").write_text(json.dumps(BILLION))
            model = f"random:{folder / 'config.json'}"
        self.executor = build_executor(
            resolve(model, folder), ModelConfig(model=model), CacheConfig(
                kv_cache_memory_bytes=(4 if args.device != "cpu" else 1) << 30),
            device=args.device,
        )  # fmt: skip
        self.kv = self.executor.models[0].kv

    def plan(self, sequences: int, start: int, num_tokens: int) -> Any:
        from mellmpi.protocol import Chunk, Sampling, StepPlan

        greedy = Sampling(9999, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, (), None)
        used = -(-(start + num_tokens) // self.kv.block_size)
        return StepPlan(self.kv.model, tuple(
            Chunk(i, start, (7,) * num_tokens, list(range(i * used, (i + 1) * used)), greedy,
                  ((1,), []))
            for i in range(sequences)
        ), ())  # fmt: skip

    def parameters(self) -> int:
        """Of the layers and the output."""
        a = self.executor.arch
        width = a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
        layer = a.hidden_size * width + 3 * a.hidden_size * a.intermediate_size
        return int(a.num_layers * layer + a.hidden_size * a.vocab_size)


def roofline(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    memory_GBps = copies(args.device)["within_device"]
    size = 8192 if args.device != "cpu" else 512
    a = torch.ones(size, size, dtype=torch.bfloat16, device=args.device)
    peak_flops = 2 * size**3 / timed(args.device, lambda: a @ a)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(args, Path(folder))
        num_parameters, context = steps.parameters(), 512
        for sequences in (1, 8, 32):
            plan = steps.plan(sequences, context - 1, 1)
            step_s = timed(args.device, lambda plan=plan: steps.executor.execute(plan))
            kv_bytes = sequences * context * steps.kv.block_bytes / steps.kv.block_size
            GBps = (2 * num_parameters + kv_bytes) / step_s / 1e9
            rows.append({"decode": sequences, "tokens_per_s": round(sequences / step_s, 1),
                         "GBps": round(GBps, 1),
                         "of_memory_bandwidth": round(GBps / memory_GBps, 3)})  # fmt: skip
        for num_tokens in (512, 2048):
            plan = steps.plan(1, 0, num_tokens)
            step_s = timed(args.device, lambda plan=plan: steps.executor.execute(plan))
            flops = 2 * num_parameters * num_tokens / step_s
            rows.append({"prefill": num_tokens, "tokens_per_s": round(num_tokens / step_s, 1),
                         "of_matrix_product": round(flops / peak_flops, 3)})  # fmt: skip
    return {"ok": True, "parameters": num_parameters, "memory_GBps": memory_GBps,
            "matrix_product_TFLOPs": round(peak_flops / 1e12, 2), "rows": rows}  # fmt: skip


CHECKS = {check.__name__: check for check in (self_test, bandwidth, tokens, migration, roofline)}

# --- the whole -----------------------------------------------------------------------------------


def alone(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One check in a process of its own; what it found, or why it failed."""
    command = [sys.executable, __file__, "--one", name, "--model", args.model]
    started_s = time.perf_counter()
    job = subprocess.Popen([*command, *(["--rehearse"] if args.rehearse else [])], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           start_new_session=True)  # fmt: skip
    try:
        out, err = job.communicate(timeout=LIMITS_S[name])
    except subprocess.TimeoutExpired:
        job.terminate()  # mpirun takes its ranks along
        job.wait()
        return {"ok": False, "why": f"not done in {LIMITS_S[name]} s"}
    took_s = round(time.perf_counter() - started_s, 1)
    if job.returncode:
        return {"ok": False, "why": err[-2000:], "took_s": took_s}
    return {**json.loads(out.splitlines()[-1]), "took_s": took_s}


def gpu(device: str) -> dict[str, Any]:
    """What it is; the driver's version, too."""
    import torch

    if device == "cpu":
        return {"name": "none: rehearsed on the CPU"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        said = "nvidia-smi is not here"
    return {"name": torch.cuda.get_device_name(0), "cuda": torch.version.cuda, "driver": said}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="for tokens and migration")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    add_json_option(parser)
    args = parser.parse_args()
    from mellmpi.runtime.gpus import count_gpus

    args.device = "cpu" if args.rehearse else "cuda:0"
    if args.one:
        print(json.dumps(CHECKS[args.one](args)))
        return 0
    if not args.rehearse and not count_gpus():
        print("no GPU here: nothing was checked", file=sys.stderr)
        return 0
    started_s, results = time.perf_counter(), {}
    for name in args.only:
        results[name] = alone(name, args)
        state = "holds" if results[name]["ok"] else f"FAILS: {results[name].get('why', '')}"
        print(f"{name:<12}{state}  ({results[name].get('took_s', 0)} s)", file=sys.stderr)
    config = {"model": args.model, "gpu": gpu(args.device), "load": round(os.getloadavg()[0], 1),
              "took_s": round(time.perf_counter() - started_s, 1)}  # fmt: skip
    finish(config, results, args.json)
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
