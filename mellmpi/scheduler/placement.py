"""Live requests and their queue: assignment to workers, return to the queue, removal."""

import heapq

from mellmpi.protocol import FRONT, Address, Assign, Rejected, Release, kv_need
from mellmpi.scheduler.first_token import FirstTokens
from mellmpi.scheduler.ledger import ACTIVE
from mellmpi.scheduler.migration import Handover
from mellmpi.scheduler.policies import Policy
from mellmpi.scheduler.queue import WaitingQueue
from mellmpi.scheduler.requests import Record, State
from mellmpi.scheduler.workers import WorkerRegistry


class Placement:
    """All live requests; the policy chooses the worker of each waiting one."""

    def __init__(self, registry: WorkerRegistry, handover: Handover, policy: Policy):
        self.registry, self.handover, self.policy = registry, handover, policy
        self.records: dict[int, Record] = {}  # by request id
        self.queue = WaitingQueue()
        self.first_tokens = FirstTokens(registry, self.queue)
        self._deadlines: list[tuple[float, int]] = []  # heap of (seconds, request id)

    def add(self, record: Record) -> None:
        """Put a new request at the end of its queue."""
        self.records[record.request.id] = record
        self.queue.append(record, self.kv_bytes(record), record.arrival_s)
        if (at_s := record.deadline_at_s) is not None:
            heapq.heappush(self._deadlines, (at_s, record.request.id))

    def end_overdue(self) -> None:
        """End the requests whose deadline has passed, wherever they are; their tokens stand."""
        while self._deadlines and self._deadlines[0][0] <= self.registry.view.now:
            at_s, request_id = heapq.heappop(self._deadlines)
            record = self.records.get(request_id)
            if record is not None and record.deadline_at_s == at_s:
                self.release(record)
                limit_s = record.request.deadline_s
                self.refuse(record, f"deadline: the answer is not complete after {limit_s:g} s")

    def release(self, record: Record) -> None:
        """Tell the owner, if there is one, to end the request."""
        if record.worker is not None:
            worker, epoch = record.owner
            self.registry.send(worker, Release(record.request.id, epoch))

    def kv_bytes(self, record: Record) -> int:
        """KV bytes of the request's tokens, in whole blocks."""
        return kv_need(self.registry.models[record.request.model], record.num_tokens)

    def place_waiting(self) -> None:
        """Place the queue in its order; skip a model once its head does not fit."""
        full: set[str] = set()
        while (record := self.queue.head(full)) is not None:
            if not self._place(record):
                full.add(record.request.model)

    def _place(self, record: Record) -> bool:
        """Assign or refuse the request, or make draining workers active; False: it has to wait."""
        model = record.request.model
        worker = self.policy.place(self.registry.view, record.slot, model)
        if worker is not None:
            self.queue.remove(record)
            self.assign(record, worker)
        elif why := self.registry.admission.refusal(record.request, record.num_tokens):
            self.refuse(record, why)
        elif not self.registry.undrain(model):
            self.wake_for(model)
            return False
        return True

    def resume(self, worker: Address) -> bool:
        """Resume pinned requests that fit on the worker; call it after the worker's own events.

        Returns True if there was one: without pinned requests, a worker takes new ones again.
        """
        if not isinstance(worker, int):
            return False
        resumed = [self._resume(record, worker) for record in self.queue.pinned_to(worker)]
        return any(resumed)

    def _resume(self, record: Record, worker: int) -> bool:
        if not self.registry.admission.can_resume(worker, self.kv_bytes(record)):
            return False
        self.queue.remove(record)
        self.assign(record, worker)
        return True

    def pin_target(self, record: Record, worker: int) -> int:
        """The worker to pin a request to that `worker` has preempted; 0: none."""
        ledger = self.registry.ledger
        pins = self.policy.resumes_at_home and ledger.state[worker] == ACTIVE
        return worker if pins and self.kv_bytes(record) <= ledger.capacity[worker] else 0

    def unpin(self, worker: int) -> None:
        """Let the requests pinned to this worker resume on any."""
        for record in self.queue.unpin(worker):
            self.registry.pin(record, 0)

    def wake_for(self, model: str) -> None:
        """Wake a worker for the queue of this model, if that is worthwhile."""
        waited_s = self.registry.view.now - self.queue.waiting_since_s(model)
        self.registry.wake_for(model, self.queue.model_bytes(model), waited_s)

    def assign(self, record: Record, worker: int) -> None:
        """WAITING → RUNNING, under a new epoch."""
        epoch = self.registry.next_epoch()
        record.move(State.RUNNING, f"assigned to {worker} under {epoch}")
        self.registry.pin(record, 0)
        self.registry.ledger.add(worker)
        self.registry.set_owner(record, worker, epoch)
        order = Assign(record.request, epoch, tuple(record.log.tokens))
        num_bytes = self.kv_bytes(record)
        self.registry.send(worker, order, num_bytes)
        if record.placed_s is None:
            self.first_tokens.placed(record, num_bytes)

    def wait_again(self, record: Record, why: str, pinned_to: int = 0) -> None:
        """Put a request that its owner has lost or preempted at the head of its queue."""
        self.handover.withdraw(record, why)
        self.registry.clear_owner(record)
        record.forecast = None
        record.move(State.WAITING, why)
        now = self.registry.view.now
        self.queue.prepend(record, self.kv_bytes(record), now, pinned_to)
        self.registry.pin(record, pinned_to)

    def refuse(self, record: Record, why: str) -> None:
        """Reject a request that is already live."""
        self.registry.out.append((FRONT, Rejected(record.request.id, why, 0.0)))
        self.forget(record, "refused")

    def forget(self, record: Record, outcome: str) -> None:
        """Remove all state of a finished request, here and at the destination of a migration."""
        self.handover.withdraw(record, outcome)
        self.registry.clear_owner(record)
        self.queue.remove(record)
        self.registry.pin(record, 0)
        del self.records[record.request.id]
        self.registry.view.requests.drop(record.slot)
