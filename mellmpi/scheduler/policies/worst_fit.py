"""Worst fit: the emptiest worker, which spreads the load. Moves nothing."""

import numpy as np

from mellmpi.scheduler.policies.base import idle_workers, room_after
from mellmpi.scheduler.view import Proposal, View


def place(view: View, row: int, model: str) -> int | None:
    """The worker with the most room left after it; lowest id breaks ties."""
    room = room_after(view, row, model)
    worker = int(np.argmax(room))
    return worker if room[worker] >= 0 else None


def rebalance(view: View) -> list[Proposal]:
    return idle_workers(view)
