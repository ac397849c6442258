"""Best fit: the fullest worker with room. No migrations."""

import numpy as np

from mellmpi.scheduler.policies.base import free_after, park_empty
from mellmpi.scheduler.view import Proposal, View


def place(view: View, row: int, model: str) -> int | None:
    """The worker with the least memory left after the placement; the lowest id of equals."""
    free = free_after(view, row, model)
    worker = int(np.argmin(np.where(free >= 0, free, np.iinfo(np.int64).max)))
    return worker if free[worker] >= 0 else None


def rebalance(view: View) -> list[Proposal]:
    return park_empty(view)
