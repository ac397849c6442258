"""Views for tests of policies. A block is 4 positions or 10 bytes; a worker has 20."""

import numpy as np

from mellmpi.scheduler import Ledger, RequestColumns, View, WorkerState
from tests.scheduler.stage import KV, request

PARKED, LOST = WorkerState.PARKED, WorkerState.LOST


def view(
    *workers: list[int],
    states=None,
    growth=0.0,
    waiting=0,
    now=100.0,
    seed=0,
    tick=1,
    answer_tokens=0.0,
):
    """A view of workers whose requests have these sizes in blocks; request ids count from 1."""
    ledger, columns = Ledger(len(workers)), RequestColumns()
    for w, sizes in enumerate(workers, start=1):
        ledger.ready(w, (KV,), 200, 8, acked=0)
        ledger.free[w] -= 10 * sum(sizes)
        for size in sizes:
            row = columns.add(request(int(columns.live.sum()) + 1, num_prompt=4 * size), KV)
            columns.worker[row], columns.movable[row] = w, True
            ledger.add(w)
    for w, state in (states or {}).items():
        if state in (PARKED, LOST):
            ledger.drop_arena(w, state)
        else:
            ledger.enter(w, state)
    growth_Bps = np.zeros(len(workers) + 1)
    growth_Bps[1:] = growth
    return View(
        now=now,
        workers=ledger,
        requests=columns,
        waiting_bytes=waiting,
        growth_Bps=growth_Bps,
        token_rate=0.0,
        answer_tokens=answer_tokens,
        park_after_s=1.0,
        seed=seed,
        tick=tick,
        period_s=0.1,
    )
