"""Commands of an operator: workers that are held, and single moves. Each is answered at once."""

import math

from mellmpi.protocol import (
    FRONT,
    DrainWorker,
    MoveRequest,
    OperatorAnswer,
    OperatorCommand,
    UndrainWorker,
)
from mellmpi.scheduler.evacuation import evacuation
from mellmpi.scheduler.ledger import LOST, WorkerState
from mellmpi.scheduler.moves import Moves
from mellmpi.scheduler.placement import Placement
from mellmpi.scheduler.requests import Record, State
from mellmpi.scheduler.view import MoveProposal


class Operator:
    """Carries out commands; moves requests away from held workers and parks these."""

    def __init__(self, placement: Placement, moves: Moves, limit_s: float):
        """`limit_s` bounds the moves away from held workers, as in `planned`."""
        self._placement, self._moves, self._limit_s = placement, moves, limit_s
        self._registry, self._ledger = placement.registry, placement.registry.ledger

    def handle(self, asked: OperatorCommand) -> None:
        """Carry a command out, and answer it."""
        error = self._no_worker(asked.worker) or self._handle(asked)
        self._registry.out.append((FRONT, OperatorAnswer(asked, error)))

    def _handle(self, asked: OperatorCommand) -> str:
        """Carry a command about an existing worker out; return the error, or ""."""
        match asked:
            case DrainWorker(worker):
                return self._drain(worker)
            case UndrainWorker(worker):
                return self._undrain(worker)
            case MoveRequest(request_id, worker):
                return self._move(request_id, worker)

    def evacuate(self) -> None:
        """Move requests away from held workers, where there is room; park those that are empty."""
        if not self._ledger.held.any():
            return  # the most frequent case
        proposals = evacuation(self._registry.view)
        for proposal in proposals:
            self._registry.apply(proposal)
        moves = [proposal for proposal in proposals if isinstance(proposal, MoveProposal)]
        self._moves.start(moves, self._limit_s)
        for worker in self._ledger.workers(WorkerState.HELD):
            self._registry.park(worker)

    # --- workers --------------------------------------------------------------------------------

    def _no_worker(self, worker: int) -> str:
        """Why no command can be about this worker, or ""."""
        last = len(self._ledger.state) - 1
        if not 1 <= worker <= last:
            return f"there is no worker {worker}; workers are 1 to {last}"
        return f"worker {worker} is lost" if self._ledger.state[worker] == LOST else ""

    def _drain(self, worker: int) -> str:
        if not self._ledger.held[worker] and (model := self._served_by_no_other(worker)):
            return (
                f"worker {worker} is the last one that can serve {model}, "
                "which has live requests; it cannot be drained"
            )
        self._registry.hold(worker)
        self._placement.unpin(worker)
        return ""

    def _served_by_no_other(self, worker: int) -> str | None:
        """A model of this worker with live requests that no other worker could run, or None."""
        ledger = self._ledger
        others = ~ledger.held & (ledger.state != LOST)
        others[worker] = False
        models = dict.fromkeys(r.request.model for r in self._placement.records.values())
        last = (m for m in models if ledger.able(m)[worker] and not (ledger.able(m) & others).any())
        return next(last, None)

    def _undrain(self, worker: int) -> str:
        if not self._ledger.held[worker]:
            return f"worker {worker} is not drained"
        self._registry.unhold(worker)
        return ""

    # --- moves ----------------------------------------------------------------------------------

    def _move(self, request_id: int, worker: int) -> str:
        if (record := self._placement.records.get(request_id)) is None:
            return f"request {request_id} has ended, or never began"
        if error := self._cannot_leave(record, worker) or self._cannot_take(worker, record):
            return error
        move = MoveProposal(request_id, worker, "operator")
        self._moves.start([move], math.inf)
        if record.worker != worker and record.offer is None:
            return f"the last move of request {request_id} failed; try again after its next token"
        return ""

    def _cannot_leave(self, record: Record, worker: int) -> str:
        name = f"request {record.request.id}"
        if record.state is State.WAITING:
            return f"{name} is on no worker: it waits"
        if record.offer is not None or record.plan is not None:
            return f"{name} is already moving"
        return f"{name} is already on worker {worker}" if record.worker == worker else ""

    def _cannot_take(self, worker: int, record: Record) -> str:
        """Why a worker cannot take a request now, or ""."""
        ledger, model, name = self._ledger, record.request.model, f"worker {worker}"
        state = WorkerState(int(ledger.state[worker]))
        if ledger.held[worker]:
            return f"{name} is drained"
        if state is not WorkerState.ACTIVE:
            return f"{name} is {state.name.lower()}"
        if not ledger.able(model)[worker]:
            return f"{name} does not serve {model}"
        if ledger.num_returning[worker]:
            return f"{name} takes back requests that it has preempted, and no others before"
        need, room = self._placement.kv_bytes(record), ledger.room(worker)
        if need > room:
            return f"{name} has no room: the request needs {need} bytes, it has {room}"
        if (most := int(ledger.max_requests[worker])) <= ledger.num_requests[worker]:
            return f"{name} has no room: it runs {most} requests, as many as it can"
        return ""
