"""How fast are the CPU kernels, compared with torch?

SmolLM2-135M in bfloat16, random tokens: all linear layers of one step (the output projection for
every row) and the same by torch's `F.linear`, attention of all layers, whole steps and prefill.
Each figure is the median of `--repeats` runs; runs of torch and mellmpi alternate. Use at most as
many threads as cores are idle.

    python bench/kernels.py --threads 1 2 --json bench/results/kernels.json
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
import torch.nn.functional as F
from numba import njit

from mellmpi.engine import KvArena, KvGeometry, PackedBatch, weights
from mellmpi.engine.cpu import CpuModel
from mellmpi.engine.cpu.attention import attend, items_of
from mellmpi.engine.cpu.linear import ADD, GATE_UP, STORE, WIDENED_ELEMENTS
from mellmpi.engine.cpu.packed_weights import activations, storage
from mellmpi.engine.cpu.parallel_for import KERNEL, parallel_for, thread_group
from mellmpi.engine.cpu.shapes import Chunks
from mellmpi.engine.cpu.step import matrix_of, project
from mellmpi.models import Architecture, resolve

DTYPE, BLOCK_SIZE, NUM_BLOCKS = torch.bfloat16, 16, 2100
DEFAULT_CACHE = Path.home() / ".cache" / "mellmpi"


@njit(**KERNEL)
def all_linears(threads, rows, weights, sizes, width, scratch, logits):
    """The matrix products of one step and nothing else."""
    buffer = np.empty(WIDENED_ELEMENTS, np.float32)
    x, x_stride, residual, hidden = (
        scratch.normed,
        sizes.normed_stride,
        scratch.residual,
        sizes.hidden,
    )
    qkv, columns, out, out_stride = scratch.qkv, sizes.qkv, scratch.attended, sizes.attended_stride
    inner, inner_stride = scratch.inner, sizes.inner_stride
    for layer in range(sizes.layers):
        at = 4 * layer
        m = matrix_of(weights, sizes, at, hidden, sizes.qkv)
        project(threads, at, m, x, x_stride, rows, weights, STORE, qkv, columns, buffer)
        m = matrix_of(weights, sizes, at + 1, width, hidden)
        project(threads, at + 1, m, out, out_stride, rows, weights, ADD, residual, hidden, buffer)
        m = matrix_of(weights, sizes, at + 2, hidden, 2 * sizes.inner)
        project(
            threads, at + 2, m, x, x_stride, rows, weights, GATE_UP, inner, inner_stride, buffer
        )
        m = matrix_of(weights, sizes, at + 3, sizes.inner, hidden)
        project(
            threads, at + 3, m, inner, inner_stride, rows, weights, ADD, residual, hidden, buffer
        )
    last, width = 4 * sizes.layers, sizes.vocabulary
    m = matrix_of(weights, sizes, last, hidden, width)
    project(threads, last, m, x, x_stride, rows, weights, STORE, logits, width, buffer)


@njit(**KERNEL)
def all_attention(threads, layers, queries, kv, chunks, heads, out):
    width = heads.heads * heads.head_dim
    layer_stride = 2 * heads.kv_heads * heads.block_size * heads.head_dim
    for layer in range(layers):
        for first, last in parallel_for(threads, layer, chunks.cu_items[-1]):
            attend(first, last, queries, kv, layer * layer_stride, chunks, heads, out, width)


def make_batch(starts: list[int], lengths: list[int], seed: int = 0) -> PackedBatch:
    """Random tokens at positions starts[i] … starts[i] + lengths[i] - 1, in scattered blocks."""
    rng = np.random.default_rng(seed)
    ends = np.add(starts, lengths)
    num_blocks = -(-int(max(ends)) // BLOCK_SIZE)
    blocks = rng.permutation(NUM_BLOCKS)[: len(starts) * num_blocks]
    spans = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
    return PackedBatch(
        tokens=rng.integers(100, 49_000, sum(lengths)).astype(np.int32),
        positions=np.concatenate(spans).astype(np.int32),
        cu_chunks=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        context_lens=ends.astype(np.int32),
        block_tables=blocks.reshape(len(starts), num_blocks).astype(np.int32),
        num_sampled=len(starts),
    )


class Bench:
    """One model on `threads` threads, and the functions that are timed."""

    def __init__(self, arch: Architecture, tensors: dict[str, torch.Tensor], threads: int):
        self.arch, self.threads = arch, threads
        self.model = CpuModel(arch, tensors, DTYPE, threads)
        geometry = KvGeometry(
            model="",
            dtype=DTYPE,
            num_layers=arch.num_layers,
            num_kv_heads=arch.num_kv_heads,
            block_size=BLOCK_SIZE,
            head_dim=arch.head_dim,
        )
        self.arena = KvArena(geometry, NUM_BLOCKS)
        self._pool = ThreadPoolExecutor(threads)

    def step(self, starts: list[int], lengths: list[int]) -> Callable[[], Any]:
        batch = make_batch(starts, lengths)
        return lambda: self.model.forward(batch, self.arena)

    def run_parallel(self, kernel: Callable[..., None], phases: int, *arguments: Any) -> None:
        """Run the kernel on all threads."""
        group, _counters = thread_group(phases, self.threads)
        futures = [self._pool.submit(kernel, group, *arguments) for _ in range(self.threads)]
        for future in futures:
            future.result()

    def linears(self, rows: int) -> Callable[[], Any]:
        model, sizes = self.model, self.model._sizes
        scratch, width = model._make_scratch(rows), self.arch.num_heads * self.arch.head_dim
        logits = np.empty(rows * sizes.vocabulary, np.float32)
        arguments = (rows, model._weights, sizes, width, scratch, logits)
        return lambda: self.run_parallel(all_linears, 4 * sizes.layers + 1, *arguments)

    def attention(self, num_seqs: int, context: int) -> Callable[[], Any]:
        batch, heads = make_batch([context - 1] * num_seqs, [1] * num_seqs), self.arch.num_heads
        chunks = Chunks(
            batch.positions,
            np.arange(num_seqs),
            batch.cu_chunks,
            batch.context_lens,
            batch.block_tables,
            items_of(batch.cu_chunks, self.arch.num_kv_heads),
        )
        queries = activations(torch.randn(num_seqs * heads * self.arch.head_dim).to(DTYPE))
        sizes, kv = self.model._heads(self.arena), storage(self.arena.tensor.view(-1))
        arguments = (self.arch.num_layers, queries, kv, chunks, sizes, np.zeros_like(queries))
        return lambda: self.run_parallel(all_attention, self.arch.num_layers, *arguments)


def torch_linears(tensors: dict[str, torch.Tensor], rows: int) -> Callable[[], Any]:
    """The same products by `F.linear`, with q, k, v joined, and gate, up."""
    joined, parts = [], {name: t for name, t in tensors.items() if t.dim() == 2}
    for index in range(len(parts) // 7):
        name = f"model.layers.{index}"
        qkv = [parts[f"{name}.self_attn.{x}_proj.weight"] for x in "qkv"]
        gate_up = [parts[f"{name}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        joined += [torch.cat(qkv), parts[f"{name}.self_attn.o_proj.weight"]]
        joined += [torch.cat(gate_up), parts[f"{name}.mlp.down_proj.weight"]]
    joined.append(parts["model.embed_tokens.weight"])
    inputs = {k: torch.randn(rows, k).to(DTYPE) for k in {m.shape[1] for m in joined}}

    def run() -> None:
        for matrix in joined:
            F.linear(inputs[matrix.shape[1]], matrix)

    return run


def medians_ms(repeats: int, **runs: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of each run; runs alternate, and the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if round_:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def measure(directory: Path, threads: int, repeats: int) -> dict[str, Any]:
    """All figures of the model in `directory` on `threads` threads."""
    torch.set_num_threads(threads)
    arch, tensors = weights.load(directory, DTYPE, torch.device("cpu"))
    bench, found = Bench(arch, dict(tensors), threads), {}
    for rows in (1, 8, 32, 128):
        runs = {"ours": bench.linears(rows), "torch": torch_linears(tensors, rows)}
        found[f"linears_ms_rows_{rows}"] = medians_ms(repeats, **runs)
    for context in (128, 1024):
        runs = {"ours": bench.attention(32, context)}
        found[f"attention_ms_32_x_{context}"] = medians_ms(repeats, **runs)["ours"]
    for num_seqs in (1, 8, 32):
        step_ms = medians_ms(repeats, ours=bench.step([191] * num_seqs, [1] * num_seqs))["ours"]
        found[f"step_ms_batch_{num_seqs}"] = step_ms
        found[f"decode_tokens_per_s_batch_{num_seqs}"] = round(1e3 * num_seqs / step_ms, 1)
    for length in (128, 512):
        prefill_ms = medians_ms(max(3, repeats // 2), ours=bench.step([0], [length]))["ours"]
        found[f"prefill_tokens_per_s_{length}"] = round(1e3 * length / prefill_ms, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE)
    record.add_json_option(parser)
    args = parser.parse_args()
    directory = resolve(args.model, args.cache_dir)
    results = {}
    for threads in args.threads:
        results[f"threads_{threads}"] = measure(directory, threads, args.repeats)
        print(threads, "threads:", results[f"threads_{threads}"], file=sys.stderr, flush=True)
    config = {"model": args.model, "dtype": "bfloat16", "context": 192, "repeats": args.repeats}
    record.finish(config, results, args.json)


if __name__ == "__main__":
    main()
