"""Worst fit: the emptiest worker, which spreads the load. No migrations."""

import numpy as np

from mellmpi.scheduler.policies.base import free_after, park_empty
from mellmpi.scheduler.view import Proposal, View


def place(view: View, row: int, model: str) -> int | None:
    """The worker with the most memory left after the placement; the lowest id of equals."""
    free = free_after(view, row, model)
    worker = int(np.argmax(free))
    return worker if free[worker] >= 0 else None


def rebalance(view: View) -> list[Proposal]:
    return park_empty(view)
