"""The one queue of requests that are on no worker, a lane for each model."""

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
    kv_bytes: int  # what it needs to be placed
    order: int  # the lower, the earlier its turn
    since_s: float  # it, or somebody behind it, has waited since then
    home: int  # the one worker it waits for; 0: any


Lane = OrderedDict[int, Waiting]  # by request id, first one first
Key = TypeVar("Key", str, int)


class WaitingQueue:
    """First come, first placed; who was placed before and lost its place comes first again.

    Nobody passes another of the same model, and models do not wait for each other. Those that
    resume where they were stand beside the lanes: only their worker has anything to offer them.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}  # by request id
        self._lanes: dict[str, Lane] = {}  # by model; none is empty
        self._homes: dict[int, Lane] = {}  # by worker; none is empty
        self._lane_bytes: Counter[str] = Counter()
        self._first, self._last = count(-1, -1), count()
        self.kv_bytes = 0  # what all of them need to be placed

    def __len__(self) -> int:
        return len(self._waiting)

    def head(self, passed: Container[str] = ()) -> Record | None:
        """Whose turn it is, of the models that have not been passed over; or None."""
        if not self._lanes:
            return None  # by far the most frequent answer
        heads = [next(iter(ln.values())) for m, ln in self._lanes.items() if m not in passed]
        return min(heads, key=lambda w: w.order).record if heads else None

    def heads(self) -> list[Record]:
        """The first one of every model."""
        return [next(iter(lane.values())).record for lane in self._lanes.values()]

    def waits_since_s(self, model: str) -> float:
        """When the one that has waited longest for this model came; those with a home aside."""
        return next(iter(self._lanes[model].values())).since_s

    def lane_bytes(self, model: str) -> int:
        """What the requests of one model need to be placed, but for those with a home."""
        return self._lane_bytes[model]

    def homes(self) -> list[int]:
        """The workers that somebody waits to resume on."""
        return list(self._homes)

    def returning(self, worker: int) -> list[Record]:
        """Those that wait to resume there, the first one first."""
        return [waiting.record for waiting in self._homes.get(worker, {}).values()]

    def append(self, record: Record, kv_bytes: int, now: float) -> None:
        self._enter(Waiting(record, kv_bytes, next(self._last), now, home=0))

    def prepend(self, record: Record, kv_bytes: int, now: float, home: int = 0) -> None:
        """First in its lane, or first of those that wait for this worker."""
        waiting = Waiting(record, kv_bytes, next(self._first), now, home)
        lane = self._enter(waiting)
        # Whom it passes must not lose the time that they have waited.
        waiting.since_s = min(now, next(iter(lane.values())).since_s)
        lane.move_to_end(record.request.id, last=False)

    def _enter(self, waiting: Waiting) -> Lane:
        request = waiting.record.request
        if waiting.home:
            lane = self._homes.setdefault(waiting.home, OrderedDict())
        else:
            lane = self._lanes.setdefault(request.model, OrderedDict())
            self._lane_bytes[request.model] += waiting.kv_bytes
        lane[request.id] = self._waiting[request.id] = waiting
        self.kv_bytes += waiting.kv_bytes
        return lane

    def remove(self, record: Record) -> None:
        """Take it out, if it is here."""
        request = record.request
        if (waiting := self._waiting.pop(request.id, None)) is None:
            return
        self.kv_bytes -= waiting.kv_bytes
        if waiting.home:
            _drop(self._homes, waiting.home, request.id)
        else:
            self._lane_bytes[request.model] -= waiting.kv_bytes
            _drop(self._lanes, request.model, request.id)

    def turn_away(self, worker: int) -> list[Record]:
        """Who waits for this worker waits for any from now on, first in its lane; who that is."""
        records = self.returning(worker)
        for record in reversed(records):
            waiting = self._waiting[record.request.id]
            self.remove(record)
            self.prepend(record, waiting.kv_bytes, waiting.since_s)
        return records


def _drop(lanes: dict[Key, Lane], key: Key, request_id: int) -> None:
    del lanes[key][request_id]
    if not lanes[key]:
        del lanes[key]
