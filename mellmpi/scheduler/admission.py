"""Room on workers: free KV bytes and request slots, and which requests can never fit."""

from typing import NamedTuple

from mellmpi.protocol import ModelKv, Request, kv_need
from mellmpi.scheduler.ledger import ACTIVE, Ledger, WorkerState


class Space(NamedTuple):
    """Free resources of one worker."""

    num_bytes: int  # of its KV arena
    num_slots: int  # requests that it may still take


class Admission:
    """Decides from the ledger whether a request fits on a worker."""

    def __init__(self, ledger: Ledger, models: dict[str, ModelKv]):
        self._ledger, self._models = ledger, models
        self._largest: dict[str, int | None] = {}  # by model: cache of `_largest_arena`

    def worker_changed(self) -> None:
        """Clear the cache; call it whenever a worker changes its state."""
        self._largest.clear()

    def space(self, worker: int) -> Space:
        ledger = self._ledger
        slots = int(ledger.max_requests[worker] - ledger.num_requests[worker])
        return Space(ledger.room(worker), slots)

    def gained(self, worker: int, before: Space) -> bool:
        """True if the worker has more bytes or more slots than `before`."""
        now = self.space(worker)
        return now.num_bytes > before.num_bytes or now.num_slots > before.num_slots

    def has_room(self, worker: int, model: str, num_bytes: int) -> bool:
        """True if a request of this model and size may be moved to the worker."""
        return bool(self._ledger.hosting(model)[worker]) and self._fits(worker, num_bytes)

    def can_resume(self, worker: int, num_bytes: int) -> bool:
        """True if a request that the worker has preempted fits there again."""
        return bool(self._ledger.state[worker] == ACTIVE) and self._fits(worker, num_bytes)

    def _fits(self, worker: int, num_bytes: int) -> bool:
        ledger = self._ledger
        has_slot = ledger.num_requests[worker] < ledger.max_requests[worker]
        return bool(has_slot) and ledger.room(worker) >= num_bytes

    def refusal(self, request: Request, num_tokens: int) -> str | None:
        """Why no remaining worker can ever hold `num_tokens` positions of the request, or None."""
        if (kv := self._models.get(request.model)) is None:
            return f"no worker serves the model {request.model}"
        need, room = kv_need(kv, num_tokens), self._largest_arena(request.model)
        if room == 0:
            return f"no worker is left that serves the model {request.model}"
        if room is None or need <= room:
            return None
        return f"it needs {need} bytes of KV cache; a worker has {room}"

    def _largest_arena(self, model: str) -> int | None:
        """Bytes of the largest arena among workers of this model that are not lost.

        0 if all of them are lost; None while a worker is starting, as its arena is unknown.
        """
        if model not in self._largest:
            ledger = self._ledger
            left = ledger.able(model) & (ledger.state != WorkerState.LOST)
            largest = int(ledger.capacity[left].max(initial=0))
            self._largest[model] = None if ledger.workers(WorkerState.STARTING) else largest
        return self._largest[model]
