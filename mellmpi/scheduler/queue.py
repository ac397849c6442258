"""Requests that are on no worker, in the order in which they are placed."""

from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import count
from typing import TypeVar

from mellmpi.scheduler.requests import Record


@dataclass(slots=True)
class Waiting:
    """A request in the queue."""

    record: Record
    kv_bytes: int  # that it needs to be placed
    order: int  # place among all requests of its priority: the lowest goes first
    since_s: float  # when it, or a request behind it, began to wait
    pinned_to: int  # the one worker it may resume on; 0: any

    @property
    def key(self) -> tuple[int, int]:
        """Sort key: the lowest goes first."""
        return self.record.request.priority, self.order


Queue = OrderedDict[int, Waiting]  # by request id, in order
Key = TypeVar("Key", str, int)


@dataclass(slots=True)
class PriorityQueue:
    """Requests by priority, lowest first; first in, first out among equals."""

    by_priority: dict[int, Queue] = field(default_factory=dict)  # none is empty
    priorities: list[int] = field(default_factory=list)  # its keys, in ascending order
    kv_bytes: Counter[int] = field(default_factory=Counter)  # by priority

    def first(self) -> Waiting:
        """The request that goes first. IndexError if there is none."""
        return next(iter(self.by_priority[self.priorities[0]].values()))

    def add(self, waiting: Waiting) -> Queue:
        """Add a request at the end of its priority; return the requests of this priority."""
        request = waiting.record.request
        if (queue := self.by_priority.get(request.priority)) is None:
            queue = self.by_priority[request.priority] = OrderedDict()
            insort(self.priorities, request.priority)
        queue[request.id] = waiting
        self.kv_bytes[request.priority] += waiting.kv_bytes
        return queue

    def remove(self, waiting: Waiting) -> None:
        request = waiting.record.request
        queue = self.by_priority[request.priority]
        del queue[request.id]
        self.kv_bytes[request.priority] -= waiting.kv_bytes
        if not queue:
            del self.by_priority[request.priority], self.kv_bytes[request.priority]
            self.priorities.remove(request.priority)

    def waiting_since_s(self) -> float:
        """When the request that has waited longest began to wait."""
        return min(next(iter(queue.values())).since_s for queue in self.by_priority.values())


class WaitingQueue:
    """One queue a model, by priority; preempted and recovered requests go to the head of theirs.

    Models do not wait for each other. Requests pinned to a worker wait in a queue of that worker:
    only its reports can make room for them.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}  # by request id
        self._by_model: dict[str, PriorityQueue] = {}  # none is empty
        self._by_worker: dict[int, PriorityQueue] = {}  # pinned requests; none is empty
        self._first, self._last = count(-1, -1), count()
        self.kv_bytes = 0  # that all of them need to be placed

    def __len__(self) -> int:
        return len(self._waiting)

    def head(self, passed_over: Container[str] = ()) -> Record | None:
        """The first unpinned request of all models that are not passed over, or None."""
        if not self._by_model:
            return None  # the most frequent case
        heads = [queue.first() for m, queue in self._by_model.items() if m not in passed_over]
        return min(heads, key=lambda w: w.key).record if heads else None

    def first(self, limit: int) -> list[Waiting]:
        """The first `limit` requests of all queues, in the order in which they were queued."""
        return nsmallest(limit, self._waiting.values(), key=lambda w: w.key)

    def heads(self) -> list[Record]:
        """The first unpinned request of every model."""
        return [queue.first().record for queue in self._by_model.values()]

    def waiting_since_s(self, model: str) -> float:
        """When the unpinned request of this model that has waited longest began to wait."""
        return self._by_model[model].waiting_since_s()

    def model_bytes(self, model: str) -> int:
        """KV bytes that the unpinned requests of this model need to be placed."""
        return sum(queue.kv_bytes.values()) if (queue := self._by_model.get(model)) else 0

    def bytes_before(self, model: str, priority: int) -> int:
        """KV bytes of the unpinned requests that go before a new one of this priority."""
        if (queue := self._by_model.get(model)) is None:
            return 0
        return sum(size for other, size in queue.kv_bytes.items() if other <= priority)

    def pinning_workers(self) -> list[int]:
        """The workers that requests are pinned to."""
        return list(self._by_worker)

    def pinned_to(self, worker: int) -> list[Record]:
        """The requests pinned to this worker, in order."""
        if (queues := self._by_worker.get(worker)) is None:
            return []  # the most frequent case
        in_order = (queues.by_priority[priority] for priority in queues.priorities)
        return [waiting.record for queue in in_order for waiting in queue.values()]

    def append(self, record: Record, kv_bytes: int, now: float) -> None:
        """Add a request at the end of its priority, in its model's queue."""
        self._enter(Waiting(record, kv_bytes, next(self._last), now, pinned_to=0))

    def prepend(self, record: Record, kv_bytes: int, now: float, pinned_to: int = 0) -> None:
        """Add a request at the head of its priority, in its model's or in a worker's queue."""
        waiting = Waiting(record, kv_bytes, next(self._first), now, pinned_to)
        queue = self._enter(waiting)
        # It inherits the waiting time of the requests that it passes.
        waiting.since_s = min(now, next(iter(queue.values())).since_s)
        queue.move_to_end(record.request.id, last=False)

    def _enter(self, waiting: Waiting) -> Queue:
        request = waiting.record.request
        if waiting.pinned_to:
            queues = self._by_worker.setdefault(waiting.pinned_to, PriorityQueue())
        else:
            queues = self._by_model.setdefault(request.model, PriorityQueue())
        self._waiting[request.id] = waiting
        self.kv_bytes += waiting.kv_bytes
        return queues.add(waiting)

    def remove(self, record: Record) -> None:
        """Take a request out, if it is in the queue."""
        request = record.request
        if (waiting := self._waiting.pop(request.id, None)) is None:
            return
        self.kv_bytes -= waiting.kv_bytes
        if waiting.pinned_to:
            _drop(self._by_worker, waiting.pinned_to, waiting)
        else:
            _drop(self._by_model, request.model, waiting)

    def unpin(self, worker: int) -> list[Record]:
        """Move the requests pinned to this worker to the heads of their models' queues.

        Returns them.
        """
        records = self.pinned_to(worker)
        for record in reversed(records):
            waiting = self._waiting[record.request.id]
            self.remove(record)
            self.prepend(record, waiting.kv_bytes, waiting.since_s)
        return records


def _drop(queues: dict[Key, PriorityQueue], key: Key, waiting: Waiting) -> None:
    queues[key].remove(waiting)
    if not queues[key].priorities:
        del queues[key]
