"""The ring: a request moves from its owner to another worker while both live their own lives.

ReceiveKv → KvReserved → SendKv → (KV, worker to worker) → KvReceived → Release. The source keeps
its copy until rank 0 has heard that the other one is complete; nothing is undone by time-out.
"""

from typing import Any

from mellmpi.core.fleet import Fleet
from mellmpi.core.requests import Offer, Record, State
from mellmpi.core.view import Move
from mellmpi.protocol import (
    OBSERVER,
    KvFailed,
    KvReceived,
    KvRefused,
    KvReserved,
    MigrationEnded,
    ReceiveKv,
    Release,
    SendKv,
    Unfreeze,
)


class Ring:
    """Offers of a request to another worker, from the first order to the last answer."""

    def __init__(self, fleet: Fleet):
        self.fleet = fleet

    def offer(self, record: Record, move: Move, num_bytes: int) -> None:
        """RUNNING → RESERVING: ask the destination for blocks; the source knows nothing yet."""
        src, _ = record.owner
        offer = Offer(move.dst, self.fleet.next_epoch(), start=0)
        record.move(State.RESERVING, f"offered to {offer.dst} under {offer.epoch}: {move.reason}")
        record.offer = offer
        self.fleet.view.requests.movable[record.slot] = False
        self.fleet.ledger.add(offer.dst)
        order = ReceiveKv(
            record.request, offer.epoch, src, len(record.log.tokens), record.num_tokens, offer.start
        )
        self.fleet.send(offer.dst, order, num_bytes)

    def answer(self, record: Record, source: int, event: Any) -> bool:
        """What the destination says to an offer; True if it owns the request now."""
        offer = record.offer
        if offer is None or offer.epoch != event.epoch:
            if event.epoch == record.epoch:
                raise record.bug(f"{event} from worker {source}, which owns it")
            return False  # of an offer that has ended, or of an owner before this one
        match event, record.state:
            case KvReserved(), State.RESERVING:
                self._send(record, offer, event.start)
            case KvRefused(), State.RESERVING:
                self._stay(record, "refused")
            case KvReceived(), State.SENDING:
                self._received(record, offer, event)
                return True
            case KvFailed(), State.SENDING:
                record.transfer_failed = True
                self._thaw(record)
                self._stay(record, "failed")
            case _:
                raise record.bug(f"{event} from worker {source}")
        return False

    def withdraw(self, record: Record, outcome: str) -> None:
        """If it is on the move, that is over: the destination lets go of what it reserved."""
        if (offer := record.offer) is not None:
            self.fleet.send(offer.dst, Release(record.request.id, offer.epoch))
            self._close_offer(record, offer, outcome)
        if record.moved_from is not None:
            self.recomputed(record, outcome)

    def destination_lost(self, record: Record, why: str) -> None:
        """The owner keeps the request, and decodes on if it had stopped."""
        if record.state is State.SENDING:
            self._thaw(record)
        self._stay(record, why)

    def recomputed(self, record: Record, outcome: str) -> None:
        """The recompute migration under way has ended."""
        src, record.moved_from = record.moved_from, None
        dst, _ = record.owner
        assert src is not None
        self._ended(record, "recompute", src, dst, outcome)

    def _send(self, record: Record, offer: Offer, start: int) -> None:
        src, epoch = record.owner
        record.move(State.SENDING, f"{offer.dst} has room")
        order = SendKv(record.request.id, epoch, offer.dst, offer.epoch, start)
        self.fleet.send(src, order)

    def _received(self, record: Record, offer: Offer, event: KvReceived) -> None:
        src, epoch = record.owner
        self.fleet.send(src, Release(record.request.id, epoch))
        self.fleet.ledger.remove(src, self.fleet.view.now)
        record.offer = None
        record.move(State.RUNNING, f"received by {offer.dst}")
        self.fleet.own(record, offer.dst, offer.epoch)
        view = self.fleet.view
        view.cost = view.cost.after_transfer(event.num_bytes, event.transfer_s)
        self._ended(record, "transfer", src, offer.dst, "moved", event.num_bytes, event.transfer_s)

    def _thaw(self, record: Record) -> None:
        src, epoch = record.owner
        self.fleet.send(src, Unfreeze(record.request.id, epoch))

    def _stay(self, record: Record, outcome: str) -> None:
        """The move came to nothing, the destination knows it; the owner keeps the request."""
        assert record.offer is not None
        self._close_offer(record, record.offer, outcome)
        record.move(State.RUNNING, outcome)
        self.fleet.view.requests.movable[record.slot] = True

    def _close_offer(self, record: Record, offer: Offer, outcome: str) -> None:
        src, _ = record.owner
        record.offer = None
        self.fleet.ledger.remove(offer.dst, self.fleet.view.now)
        self._ended(record, "transfer", src, offer.dst, outcome)

    def _ended(self, record: Record, mode: str, src: int, dst: int, outcome: str,
               num_bytes: int = 0, transfer_s: float = 0.0) -> None:  # fmt: skip
        ended = MigrationEnded(record.request.id, mode, src, dst, num_bytes, transfer_s, outcome)
        self.fleet.out.append((OBSERVER, ended))
