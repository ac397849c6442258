"""Requests that are on no worker, in the order in which they are placed."""

from collections import Counter, OrderedDict
from collections.abc import Container
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from mellmpi.scheduler.requests import Record


@dataclass(slots=True)
class Waiting:
    """A request in the queue."""

    record: Record
    kv_bytes: int  # that it needs to be placed
    order: int  # place among all models: the lowest goes first
    since_s: float  # when it, or a request behind it, began to wait
    pinned_to: int  # the one worker it may resume on; 0: any


Queue = OrderedDict[int, Waiting]  # by request id, in order
Key = TypeVar("Key", str, int)


class WaitingQueue:
    """One queue a model, first in, first out; preempted and recovered requests go to the head.

    Models do not wait for each other. Requests pinned to a worker wait in a queue of that worker:
    only its reports can make room for them.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}  # by request id
        self._by_model: dict[str, Queue] = {}  # none is empty
        self._by_worker: dict[int, Queue] = {}  # pinned requests; none is empty
        self._model_bytes: Counter[str] = Counter()
        self._first, self._last = count(-1, -1), count()
        self.kv_bytes = 0  # that all of them need to be placed

    def __len__(self) -> int:
        return len(self._waiting)

    def head(self, passed_over: Container[str] = ()) -> Record | None:
        """The first unpinned request of all models that are not passed over, or None."""
        if not self._by_model:
            return None  # the most frequent case
        heads = [next(iter(q.values())) for m, q in self._by_model.items() if m not in passed_over]
        return min(heads, key=lambda w: w.order).record if heads else None

    def heads(self) -> list[Record]:
        """The first unpinned request of every model."""
        return [next(iter(queue.values())).record for queue in self._by_model.values()]

    def waiting_since_s(self, model: str) -> float:
        """When the unpinned request of this model that has waited longest began to wait."""
        return next(iter(self._by_model[model].values())).since_s

    def model_bytes(self, model: str) -> int:
        """KV bytes that the unpinned requests of this model need to be placed."""
        return self._model_bytes[model]

    def pinning_workers(self) -> list[int]:
        """The workers that requests are pinned to."""
        return list(self._by_worker)

    def pinned_to(self, worker: int) -> list[Record]:
        """The requests pinned to this worker, in order."""
        return [waiting.record for waiting in self._by_worker.get(worker, {}).values()]

    def append(self, record: Record, kv_bytes: int, now: float) -> None:
        """Add a request at the end of its model's queue."""
        self._enter(Waiting(record, kv_bytes, next(self._last), now, pinned_to=0))

    def prepend(self, record: Record, kv_bytes: int, now: float, pinned_to: int = 0) -> None:
        """Add a request at the head of its model's queue, or of the queue of a worker."""
        waiting = Waiting(record, kv_bytes, next(self._first), now, pinned_to)
        queue = self._enter(waiting)
        # It inherits the waiting time of the requests that it passes.
        waiting.since_s = min(now, next(iter(queue.values())).since_s)
        queue.move_to_end(record.request.id, last=False)

    def _enter(self, waiting: Waiting) -> Queue:
        request = waiting.record.request
        if waiting.pinned_to:
            queue = self._by_worker.setdefault(waiting.pinned_to, OrderedDict())
        else:
            queue = self._by_model.setdefault(request.model, OrderedDict())
            self._model_bytes[request.model] += waiting.kv_bytes
        queue[request.id] = self._waiting[request.id] = waiting
        self.kv_bytes += waiting.kv_bytes
        return queue

    def remove(self, record: Record) -> None:
        """Take a request out, if it is in the queue."""
        request = record.request
        if (waiting := self._waiting.pop(request.id, None)) is None:
            return
        self.kv_bytes -= waiting.kv_bytes
        if waiting.pinned_to:
            _drop(self._by_worker, waiting.pinned_to, request.id)
        else:
            self._model_bytes[request.model] -= waiting.kv_bytes
            _drop(self._by_model, request.model, request.id)

    def unpin(self, worker: int) -> list[Record]:
        """Move the requests pinned to this worker to the head of their models' queues.

        Returns them.
        """
        records = self.pinned_to(worker)
        for record in reversed(records):
            waiting = self._waiting[record.request.id]
            self.remove(record)
            self.prepend(record, waiting.kv_bytes, waiting.since_s)
        return records


def _drop(queues: dict[Key, Queue], key: Key, request_id: int) -> None:
    del queues[key][request_id]
    if not queues[key]:
        del queues[key]
