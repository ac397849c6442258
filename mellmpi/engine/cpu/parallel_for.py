"""Parallel-for: the threads of a step claim items, and a phase ends when all its items are done.

An item's result does not depend on the thread that computes it, so results have the same bits for
any number of threads. A phase waits for items, not for threads: a thread that starts late finds no
items left, and a descheduled thread delays only the items that it has claimed. (OpenMP waits for
every thread at each loop, and slows down by 10-20x when another process wants a core.)
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mellmpi.engine.cpu.vectors import I32, I64, external

CLAIMED, DONE, PHASE_STRIDE = 0, 8, 16  # int64 indexes: each counter has its own cache line
SPINS = 2000  # pauses, some 30 us, before the thread yields its core

KERNEL = {"nogil": True, "error_model": "numpy"}


class ThreadGroup(NamedTuple):
    """State shared by the threads of one step; each step makes its own.

    It holds an address instead of an array because numba 0.68 never drops a generator's references
    to its arguments: `parallel_for` would leak the counters of every step.
    """

    counters: int  # address of int64 [phases * PHASE_STRIDE], zero at the start
    size: int  # threads


def thread_group(phases: int, size: int) -> tuple[ThreadGroup, np.ndarray]:
    """A group of `size` threads, and its counters: int64 [phases * PHASE_STRIDE].

    The caller must hold the counters until the step has ended.
    """
    counters = np.zeros(phases * PHASE_STRIDE, np.int64)
    return ThreadGroup(counters.ctypes.data, size), counters


def _counter(b, address, at):
    return b.gep(b.inttoptr(address, I64.as_pointer()), [at])


@intrinsic
def fetch_add(typing, address, at, amount):
    """Atomically add to element `at` of the int64 array at `address`; its value before."""

    def emit(context, b, sig, args):
        return b.atomic_rmw("add", _counter(b, *args[:2]), args[2], "acq_rel")

    return types.int64(types.int64, types.int64, types.int64), emit


@intrinsic
def load_acquire(typing, address, at):
    """Element `at` of the int64 array at `address`; writes before its `fetch_add` are visible."""

    def emit(context, b, sig, args):
        return b.load_atomic(_counter(b, *args), "acquire", 8)

    return types.int64(types.int64, types.int64), emit


@intrinsic
def pause(typing):
    """Wait a few cycles without loading the core's other hardware thread."""

    def emit(context, b, sig, args):
        if "x86" in b.module.triple or "i386" in b.module.triple:
            b.call(external(b, "llvm.x86.sse2.pause", ir.VoidType()), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def sched_yield(typing):
    """Let another process have the core (POSIX)."""

    def emit(context, b, sig, args):
        b.call(external(b, "sched_yield", I32), [])
        return context.get_dummy_value()

    return types.void(), emit


@njit(**KERNEL)
def wait_for(threads, phase, items):
    """Wait until all items of the phase are done."""
    spins = 0
    while load_acquire(threads.counters, phase * PHASE_STRIDE + DONE) < items:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            sched_yield()


@njit(**KERNEL)
def parallel_for(threads, phase, items):
    """Claim items of 0 … items - 1 for this thread, as (first, last + 1); then wait for the phase.

    A claimed range counts as done when the caller asks for the next one.
    """
    at = phase * PHASE_STRIDE
    # A single thread claims all items at once; else ranges are short, to balance the end.
    grain = items if threads.size == 1 else max(1, items // (8 * threads.size))
    first = fetch_add(threads.counters, at + CLAIMED, grain)
    while first < items:
        last = min(first + grain, items)
        yield first, last
        fetch_add(threads.counters, at + DONE, last - first)
        first = fetch_add(threads.counters, at + CLAIMED, grain)
    wait_for(threads, phase, items)
