"""The start of moves that a policy or an operator wants, as far as they are possible now."""

from collections.abc import Sequence

from mellmpi.protocol import Release
from mellmpi.scheduler.migration import planned
from mellmpi.scheduler.placement import Placement
from mellmpi.scheduler.planner import RECOMPUTE, Plan
from mellmpi.scheduler.requests import Record, State
from mellmpi.scheduler.view import MoveProposal


class Moves:
    """Plans the moves of a round together, and starts each as a recompute or as a handover."""

    def __init__(self, placement: Placement):
        self._placement, self._registry = placement, placement.registry

    def start(self, moves: Sequence[MoveProposal], limit_s: float) -> None:
        """Start the moves that are possible; `limit_s` as in `planned`."""
        for record, move, plan in planned(moves, self._placement.records, self._registry, limit_s):
            self._start(record, move, plan)

    def _start(self, record: Record, move: MoveProposal, plan: Plan) -> None:
        num_bytes = self._placement.kv_bytes(record)
        if not self._registry.admission.has_room(move.dst, record.request.model, num_bytes):
            return
        self._placement.handover.announce(record, move, plan)
        if plan.mode == RECOMPUTE:
            self._recompute(record, move)
        else:
            self._placement.handover.offer(record, move, num_bytes, plan.start)

    def _recompute(self, record: Record, move: MoveProposal) -> None:
        src, epoch = record.owner
        self._registry.send(src, Release(record.request.id, epoch))
        self._registry.clear_owner(record)
        record.move(State.WAITING, f"recompute at {move.dst}: {move.reason}")
        record.moved_from = src
        self._placement.assign(record, move.dst)
