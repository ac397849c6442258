"""Best fit: the fullest worker that has room. Moves nothing."""

import numpy as np

from mellmpi.scheduler.policies.base import idle_workers, room_after
from mellmpi.scheduler.view import Proposal, View


def place(view: View, row: int, model: str) -> int | None:
    """The worker with the least room left after it; lowest id breaks ties."""
    room = room_after(view, row, model)
    worker = int(np.argmin(np.where(room >= 0, room, np.iinfo(np.int64).max)))
    return worker if room[worker] >= 0 else None


def rebalance(view: View) -> list[Proposal]:
    return idle_workers(view)
