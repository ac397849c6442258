"""The ring: a request moves from its owner to another worker while both live their own lives.

ReceiveKv → KvReserved → SendKv → (KV, worker to worker) → KvReceived → Release. The source keeps
its copy until rank 0 has heard that the other one is complete; nothing is undone by time-out.
"""

from dataclasses import replace
from typing import Any

from mellmpi.protocol import (
    OBSERVER,
    KvFailed,
    KvReceived,
    KvRefused,
    KvReserved,
    MigrationEnded,
    MigrationStarted,
    ReceiveKv,
    Release,
    SendKv,
    Unfreeze,
)
from mellmpi.scheduler.planner import PAUSE, Plan
from mellmpi.scheduler.requests import KvOffer, Record, State
from mellmpi.scheduler.view import MoveProposal
from mellmpi.scheduler.workers import WorkerRegistry

CAUSES = ("checksum", "truncated", "size", "peer lost", "no room", "KV layout")


def cause(reason: str) -> str:
    """Of a KvFailed, in few words: they are counted."""
    return next((words for words in CAUSES if reason.startswith(words)), "other")


class Handover:
    """Offers of a request to another worker, from the first order to the last answer."""

    def __init__(self, registry: WorkerRegistry):
        self.registry = registry

    def announce(self, record: Record, move: MoveProposal, plan: Plan) -> None:
        """It begins to move as planned."""
        src, _ = record.owner
        record.plan, record.planned_s, record.landed = plan, self.registry.view.now, None
        self.registry.in_flight.add(self._hosts(src, move.dst), move.dst, plan)
        started = MigrationStarted(
            record.request.id,
            plan.mode,
            src,
            move.dst,
            move.reason,
            plan.start,
            plan.num_bytes,
            plan.seconds,
            plan.downtime_s,
        )
        self.registry.out.append((OBSERVER, started))

    def _hosts(self, src: int, dst: int) -> tuple[int, int]:
        return self.registry.estimates.links.hosts(src, dst)

    def offer(self, record: Record, move: MoveProposal, num_bytes: int, start: int) -> None:
        """RUNNING → RESERVING: ask the destination for blocks; the source knows nothing yet."""
        src, _ = record.owner
        offer = KvOffer(move.dst, self.registry.next_epoch(), start)
        record.move(State.RESERVING, f"offered to {offer.dst} under {offer.epoch}: {move.reason}")
        record.offer = offer
        self.registry.view.requests.movable[record.slot] = False
        self.registry.ledger.add(offer.dst)
        known = record.log.tokens
        order = ReceiveKv(
            record.request,
            offer.epoch,
            src,
            len(known),
            record.num_tokens,
            start,
            tuple(known) if start else (),
        )
        self.registry.send(offer.dst, order, num_bytes)

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
                self._stay(record, f"failed: {cause(event.reason)}")
            case _:
                raise record.bug(f"{event} from worker {source}")
        return False

    def withdraw(self, record: Record, outcome: str) -> None:
        """If it is on the move, that is over: the destination lets go of what it reserved."""
        if (offer := record.offer) is not None:
            self.registry.send(offer.dst, Release(record.request.id, offer.epoch))
            self._close_offer(record, offer, outcome)
        if record.moved_from is not None:
            self.recomputed(record, outcome)
        record.landed = None

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
        self._ended(record, src, dst, outcome)

    def resumed(self, record: Record) -> None:
        """The first token since its KV has moved."""
        plan, record.landed = record.landed, None
        assert plan is not None
        now, told_s = self.registry.view.now, record.told_s
        if told_s is not None:
            hosts = self._hosts(plan.src, plan.dst)
            self.registry.estimates.took(PAUSE[plan.mode], hosts, *plan.last_s, now - told_s)

    def _send(self, record: Record, offer: KvOffer, start: int) -> None:
        """What the destination knows from other requests is neither sent nor computed."""
        src, epoch = record.owner
        if start > offer.start:
            self._spare(record, offer, start)
        record.move(State.SENDING, f"{offer.dst} has room")
        order = SendKv(record.request.id, epoch, offer.dst, offer.epoch, start)
        self.registry.send(src, order)

    def _spare(self, record: Record, offer: KvOffer, start: int) -> None:
        """From `start` on is all that remains: the link is free of the rest, for later moves."""
        plan, (src, _) = record.plan, record.owner
        assert plan is not None
        kv = self.registry.models[record.request.model]
        num_bytes = plan.num_bytes - (start - offer.start) // kv.block_size * kv.block_bytes
        link = self.registry.estimates.links.between(src, offer.dst)
        hosts = self._hosts(src, offer.dst)
        self.registry.in_flight.add(hosts, offer.dst, plan, -1)
        record.plan = replace(
            plan,
            start=0,
            num_bytes=num_bytes,
            work_s=link.transfer_s(num_bytes + plan.shared_bytes),
        )
        self.registry.in_flight.add(hosts, offer.dst, record.plan)

    def _received(self, record: Record, offer: KvOffer, event: KvReceived) -> None:
        src, epoch = record.owner
        self.registry.send(src, Release(record.request.id, epoch))
        self.registry.ledger.remove(src, self.registry.view.now)
        record.offer = None
        record.move(State.RUNNING, f"received by {offer.dst}")
        self.registry.own(record, offer.dst, offer.epoch)
        view = self.registry.view
        view.cost = view.cost.after_transfer(event.num_bytes, event.transfer_s)
        assert record.plan is not None
        record.landed = record.plan
        self.registry.estimates.links.moved(
            src, offer.dst, event.num_bytes + record.plan.shared_bytes, event.transfer_s, view.now
        )
        self._ended(record, src, offer.dst, "moved", event.num_bytes, event.transfer_s)

    def _thaw(self, record: Record) -> None:
        src, epoch = record.owner
        self.registry.send(src, Unfreeze(record.request.id, epoch))

    def _stay(self, record: Record, outcome: str) -> None:
        """The move came to nothing, the destination knows it; the owner keeps the request."""
        assert record.offer is not None
        self._close_offer(record, record.offer, outcome)
        record.move(State.RUNNING, outcome)
        self.registry.view.requests.movable[record.slot] = True

    def _close_offer(self, record: Record, offer: KvOffer, outcome: str) -> None:
        src, _ = record.owner
        record.offer = None
        self.registry.ledger.remove(offer.dst, self.registry.view.now)
        self._ended(record, src, offer.dst, outcome)

    def _ended(
        self,
        record: Record,
        src: int,
        dst: int,
        outcome: str,
        num_bytes: int = 0,
        transfer_s: float = 0.0,
    ) -> None:
        plan, record.plan = record.plan, None
        assert plan is not None
        self.registry.in_flight.add(self._hosts(src, dst), dst, plan, -1)
        if outcome == "moved":
            took_s = self.registry.view.now - record.planned_s
            self.registry.estimates.took(
                plan.mode, self._hosts(src, dst), plan.wait_s, plan.work_s, took_s
            )
        ended = MigrationEnded(
            record.request.id, plan.mode, src, dst, num_bytes, transfer_s, outcome
        )
        self.registry.out.append((OBSERVER, ended))
