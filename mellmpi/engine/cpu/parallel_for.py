"""Several threads through one step: they claim items, and a phase ends when all items are done.

What an item computes does not depend on who computes it, so results are the same bits for any
number of threads. Nobody waits for a *thread*: a helper that the operating system did not start in
time simply finds nothing left, and one that lost its core delays only the items it holds. (OpenMP
waits for all its threads at each loop, and falls by 10-20x when another process wants a core.)
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mellmpi.engine.cpu.vectors import I32, I64, external

CLAIMED, DONE, PHASE_STRIDE = 0, 8, 16  # int64 indexes: a cache line for each counter
SPINS = 2000  # pauses, some 30 us, before the core is offered to others

KERNEL = {"nogil": True, "error_model": "numpy"}


class Team(NamedTuple):
    """What the threads of one step share; fresh for every step.

    An address and no array: numba 0.68 keeps a reference for ever to what a generator (`shares`)
    was given, and so leaked the counters of every step.
    """

    counters: int  # address of int64 [phases * PHASE_STRIDE], zero at the start
    size: int  # threads


def team(phases: int, size: int) -> tuple[Team, np.ndarray]:
    """And the counters themselves: to be held until the step is over."""
    counters = np.zeros(phases * PHASE_STRIDE, np.int64)
    return Team(counters.ctypes.data, size), counters


def _counter(b, address, at):
    return b.gep(b.inttoptr(address, I64.as_pointer()), [at])


@intrinsic
def fetch_add(typing, address, at, amount):
    """Add to number `at` of the int64 at an address, for all threads to see; what it was before."""

    def emit(context, b, sig, args):
        return b.atomic_rmw("add", _counter(b, *args[:2]), args[2], "acq_rel")

    return types.int64(types.int64, types.int64, types.int64), emit


@intrinsic
def read_shared(typing, address, at):
    """What number `at` is, and with it all that was written before it was added to."""

    def emit(context, b, sig, args):
        return b.load_atomic(_counter(b, *args), "acquire", 8)

    return types.int64(types.int64, types.int64), emit


@intrinsic
def pause(typing):
    """Wait a few cycles without loading the core's other half."""

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
def wait_for(team, phase, items):
    """Until all items of the phase are done, whoever does them."""
    spins = 0
    while read_shared(team.counters, phase * PHASE_STRIDE + DONE) < items:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            sched_yield()


@njit(**KERNEL)
def shares(team, phase, items):
    """This thread's part of the items 0 … items - 1 of a phase, as (first, last + 1); then wait.

    What is yielded counts as done when the next is asked for.
    """
    at = phase * PHASE_STRIDE
    # All at once for one thread, else so few that nobody waits long at the end.
    grain = items if team.size == 1 else max(1, items // (8 * team.size))
    first = fetch_add(team.counters, at + CLAIMED, grain)
    while first < items:
        last = min(first + grain, items)
        yield first, last
        fetch_add(team.counters, at + DONE, last - first)
        first = fetch_add(team.counters, at + CLAIMED, grain)
    wait_for(team, phase, items)
