"""Live requests and their queue: how a request gets onto a worker, off it again, and to its end."""

from mellmpi.protocol import FRONT, Address, Assign, Rejected, kv_need
from mellmpi.scheduler.ledger import ACTIVE
from mellmpi.scheduler.migration import Handover
from mellmpi.scheduler.policies import Policy
from mellmpi.scheduler.queue import WaitingQueue
from mellmpi.scheduler.requests import Record, State
from mellmpi.scheduler.workers import WorkerRegistry


class Placement:
    """Which live request is on which worker; the policy says where one may go."""

    def __init__(self, registry: WorkerRegistry, handover: Handover, policy: Policy):
        self.registry, self.handover, self.policy = registry, handover, policy
        self.records: dict[int, Record] = {}  # by request id
        self.queue = WaitingQueue()

    def kv_bytes(self, record: Record) -> int:
        return kv_need(self.registry.models[record.request.model], record.num_tokens)

    def place_waiting(self) -> None:
        """Place the queue in its order; a model whose head fits nowhere is passed over."""
        full: set[str] = set()
        while (record := self.queue.head(full)) is not None:
            if not self._place(record):
                full.add(record.request.model)

    def _place(self, record: Record) -> bool:
        """Assign or refuse it, or get a worker back for it; False: it has to wait."""
        model = record.request.model
        worker = self.policy.place(self.registry.view, record.slot, model)
        if worker is not None:
            self.queue.remove(record)
            self.assign(record, worker)
        elif (why := self.registry.refusal(record.request, record.num_tokens)) is not None:
            self.refuse(record, why)
        elif not self.registry.undrain(model):
            self.wake_for(model)
            return False
        return True

    def resume(self, worker: Address) -> bool:
        """Who was preempted there goes back as soon as it fits; only its own word makes room.

        True if somebody did: with nobody left who is to resume there, it takes new ones again.
        """
        if not isinstance(worker, int):
            return False
        returned = [self._returns(r, worker) for r in self.queue.returning(worker)]
        return any(returned)

    def _returns(self, record: Record, worker: int) -> bool:
        if not self.registry.can_return(worker, self.kv_bytes(record)):
            return False
        self.queue.remove(record)
        self.assign(record, worker)
        return True

    def home(self, record: Record, worker: int) -> int:
        """The worker on which a preempted request has to resume; 0: on any."""
        ledger = self.registry.ledger
        stays = self.policy.resumes_at_home and ledger.state[worker] == ACTIVE
        return worker if stays and self.kv_bytes(record) <= ledger.capacity[worker] else 0

    def turn_away(self, worker: int) -> None:
        """It is nobody's home any more."""
        for record in self.queue.turn_away(worker):
            self.registry.keep_for(record, 0)

    def wake_for(self, model: str) -> None:
        waited_s = self.registry.view.now - self.queue.waits_since_s(model)
        self.registry.wake_for(model, self.queue.lane_bytes(model), waited_s)

    def assign(self, record: Record, worker: int) -> None:
        epoch = self.registry.next_epoch()
        record.move(State.RUNNING, f"assigned to {worker} under {epoch}")
        self.registry.keep_for(record, 0)
        self.registry.ledger.add(worker)
        self.registry.own(record, worker, epoch)
        order = Assign(record.request, epoch, tuple(record.log.tokens))
        self.registry.send(worker, order, self.kv_bytes(record))

    def wait_again(self, record: Record, why: str, home: int = 0) -> None:
        """The owner has lost it, or given it back: first in the queue."""
        self.handover.withdraw(record, why)
        self.registry.leave(record)
        record.move(State.WAITING, why)
        self.queue.prepend(record, self.kv_bytes(record), self.registry.view.now, home)
        self.registry.keep_for(record, home)

    def refuse(self, record: Record, why: str) -> None:
        self.registry.out.append((FRONT, Rejected(record.request.id, why)))
        self.forget(record, "refused")

    def forget(self, record: Record, outcome: str) -> None:
        """The request is over: nothing of it stays on rank 0, nor at a destination."""
        self.handover.withdraw(record, outcome)
        self.registry.leave(record)
        self.queue.remove(record)
        self.registry.keep_for(record, 0)
        del self.records[record.request.id]
        self.registry.view.requests.drop(record.slot)
