"""A decoder on CPUs: one compiled call a step, over packed weights and the paged arena.

A row's result has the same bits for any batch, any division of its prompt into chunks, any blocks
and any number of threads (see `gemm`).
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from time import monotonic

import numpy as np
import torch

from mellmpi.engine.cpu.attention import items_of
from mellmpi.engine.cpu.disk_cache import compile_lock
from mellmpi.engine.cpu.features import HAS_BF16_DOT
from mellmpi.engine.cpu.load import sizes_of, take_weights
from mellmpi.engine.cpu.packed_weights import activation_dtype, storage
from mellmpi.engine.cpu.parallel_for import thread_group
from mellmpi.engine.cpu.rope import RopeTable
from mellmpi.engine.cpu.shapes import Chunks, Heads, Scratch
from mellmpi.engine.cpu.step import num_phases, step
from mellmpi.engine.cpu.vectors import LANES
from mellmpi.engine.kv_arena import KvArena, KvGeometry
from mellmpi.engine.packing import PackedBatch
from mellmpi.models import Architecture

LOG2E = 1.4426950408889634
NO_WINDOW = 1 << 40
DTYPES = (torch.float32, torch.bfloat16)


def unsupported(arch: Architecture, dtype: torch.dtype, block_size: int) -> str | None:
    """The reason why `CpuModel` cannot run this model (`TorchModel` can), or None."""
    if dtype not in DTYPES:
        return f"the CPU kernels compute in float32 or bfloat16, not {dtype}"
    if arch.head_dim % LANES:
        return f"the CPU kernels take head_dim in multiples of {LANES}, not {arch.head_dim}"
    if block_size % LANES:
        return f"the CPU kernels take --block-size in multiples of {LANES}, not {block_size}"
    return None


class CpuModel:
    """One decoder and its packed weights; `weights` is emptied, to hold them in memory once only.

    In bfloat16 weights, KV and the inputs of matrix products are bfloat16; sums, norms, softmax
    and the residual stream are float32. The layout inside a block (`shapes.Heads`) is that of the
    kernels: no other model class can read it. ValueError as `unsupported` says.
    """

    def __init__(
        self,
        arch: Architecture,
        weights: dict[str, torch.Tensor],
        dtype: torch.dtype,
        num_threads: int = 1,
    ):
        if reason := unsupported(arch, dtype, LANES):
            raise ValueError(reason)
        self.arch, self.dtype, self.num_threads = arch, dtype, num_threads
        self._sizes, self._weights = sizes_of(arch, dtype), take_weights(arch, weights, dtype)
        self.warm_up_s = 0.0  # seconds that `warm_up` took
        self._rope = RopeTable(arch)
        self._scratch = self._make_scratch(1)
        self._head_inputs: tuple[object, ...] | None = None  # of a step without tokens
        self._pool = ThreadPoolExecutor(num_threads - 1) if num_threads > 1 else None

    @property
    def arithmetic(self) -> str:
        """Equal for models whose results are bitwise equal.

        All CPUs sum in the same order; AVX512-BF16 rounds products of bfloat16 in its own way.
        """
        if self.dtype == torch.float32:
            return "float32 on CPUs"
        return f"bfloat16 on CPUs {'with' if HAS_BF16_DOT else 'without'} AVX512-BF16"

    def forward(self, batch: PackedBatch, arena: KvArena) -> torch.Tensor:
        """Compute all rows and write their K and V into the arena.

        Returns the logits of the sampled rows, float32 [num_sampled, vocab]. ValueError if the
        kernels do not support the arena's block size.
        """
        rows, sizes = len(batch.tokens), self._sizes
        if rows * sizes.hidden > len(self._scratch.residual):
            self._scratch = self._make_scratch(rows)
        chunks, heads = _chunks(batch, self.arch.num_kv_heads), self._heads(arena)
        rope = self._rope.up_to(int(batch.context_lens.max()))
        inputs = chunks, self._weights, sizes, heads, rope, storage(arena.elements), self._scratch
        # After the step, `logits_of` finds the residual stream in the scratch memory.
        self._head_inputs = (_no_chunks(batch), *inputs[1:]) if batch.is_scored else None
        return self._logits(batch.tokens, batch.last_rows, inputs)

    def logits_of(self, rows: np.ndarray) -> torch.Tensor:
        """Logits of rows int32 [n] of the last batch, which `is_scored`: float32 [n, vocab]."""
        assert self._head_inputs is not None, "the last batch is not scored"
        return self._logits(np.zeros(0, np.int32), rows, self._head_inputs)

    def _logits(
        self, tokens: np.ndarray, rows: np.ndarray, inputs: tuple[object, ...]
    ) -> torch.Tensor:
        """Run a step over `tokens`, which may be none; logits of `rows` of the residual stream."""
        logits = np.empty((len(rows), self._sizes.vocabulary), np.float32)
        self._run(tokens, rows, *inputs, logits.ravel())
        return torch.from_numpy(logits)[:, : self.arch.vocab_size]

    def warm_up(self) -> None:
        """Compile all code that a step runs (some 10 s), or load it from disk (0.2 s)."""
        arch = self.arch
        geometry = KvGeometry(
            model="",
            dtype=self.dtype,
            num_layers=arch.num_layers,
            num_kv_heads=arch.num_kv_heads,
            block_size=LANES,
            head_dim=arch.head_dim,
        )
        one, zero = np.ones(1, np.int32), np.zeros(1, np.int32)
        batch = PackedBatch(zero, zero, np.array([0, 1], np.int32), one, zero[None], num_sampled=1)
        began_s = monotonic()
        with compile_lock(step):
            self.forward(batch, KvArena(geometry, 1))
        self.warm_up_s = monotonic() - began_s

    def _run(self, *arguments: object) -> None:
        """Run one step on all threads; a thread that starts late finds no items left."""
        threads, counters = thread_group(num_phases(self._sizes.layers), self.num_threads)
        futures: list[Future[None]] = []
        if self._pool is not None:
            futures = [
                self._pool.submit(step, threads, *arguments) for _ in range(self.num_threads - 1)
            ]
        step(threads, *arguments)
        for future in futures:
            if not future.cancel():
                future.result()
        del counters  # held until here: the kernels have its address

    def _heads(self, arena: KvArena) -> Heads:
        arch, block_size = self.arch, arena.block_size
        if reason := unsupported(arch, self.dtype, block_size):
            raise ValueError(reason)
        return Heads(
            heads=arch.num_heads,
            kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            block_size=block_size,
            block_stride=arena.block_bytes // self.dtype.itemsize,
            window=arch.sliding_window or NO_WINDOW,
            scale=np.float32(LOG2E / arch.head_dim**0.5),
            qk_norm=arch.qk_norm,
            eps=np.float32(arch.rms_norm_eps),
        )

    def _make_scratch(self, rows: int) -> Scratch:
        sizes = self._sizes

        def floats(columns: int) -> np.ndarray:
            return np.zeros(rows * columns, np.float32)

        def stored(columns: int) -> np.ndarray:
            return np.zeros(rows * columns, activation_dtype(self.dtype))

        return Scratch(
            residual=floats(sizes.hidden),
            normed=stored(sizes.normed_stride),
            qkv=floats(sizes.qkv),
            queries=stored(self.arch.num_heads * self.arch.head_dim),
            attended=stored(sizes.attended_stride),
            inner=stored(sizes.inner_stride),
        )


def _no_chunks(batch: PackedBatch) -> Chunks:
    """The chunks of a step without tokens."""
    nothing = replace(
        batch,
        tokens=batch.tokens[:0],
        positions=batch.positions[:0],
        cu_chunks=batch.cu_chunks[:1],
        context_lens=batch.context_lens[:0],
        block_tables=batch.block_tables[:0],
    )
    return _chunks(nothing, 1)


def _chunks(batch: PackedBatch, kv_heads: int) -> Chunks:
    return Chunks(
        positions=batch.positions,
        row_chunks=np.repeat(np.arange(batch.num_chunks), np.diff(batch.cu_chunks)),
        cu_chunks=batch.cu_chunks,
        context_lens=batch.context_lens,
        tables=batch.block_tables,
        cu_items=items_of(batch.cu_chunks, kv_heads),
    )
