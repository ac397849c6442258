"""The protocol by which a request changes its worker while both workers go on with their steps.

ReceiveKv → KvReserved → SendKv → (KV, worker to worker) → KvReceived → Release. The source keeps
its copy until the destination has confirmed a complete one; no step ends by a time-out.
"""

from dataclasses import replace

from mellmpi.protocol import (
    OBSERVER,
    KvFailed,
    KvReceived,
    KvRefused,
    KvReserved,
    MigrationEnded,
    MigrationStarted,
    OfferAnswer,
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
    """The category of a `KvFailed.reason`, for counting."""
    return next((category for category in CAUSES if reason.startswith(category)), "other")


class Handover:
    """All migrations, from the first command to the last answer."""

    def __init__(self, registry: WorkerRegistry):
        self.registry = registry

    def announce(self, record: Record, move: MoveProposal, plan: Plan) -> None:
        """Record that the planned migration of the request starts."""
        src, _ = record.owner
        record.plan, record.planned_s = plan, self.registry.view.now
        record.completed_plan = None
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
        """RUNNING → RESERVING: ask the destination for blocks; the source is not involved yet."""
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

    def answer(self, record: Record, source: int, event: OfferAnswer) -> KvReceived | None:
        """Apply the destination's answer to an offer; return it if the request has changed owner.

        Answers to offers that have ended are ignored. RuntimeError for an answer that the protocol
        does not allow in the current state.
        """
        offer = record.offer
        if offer is None or offer.epoch != event.epoch:
            if event.epoch == record.epoch:
                raise record.bug(f"{event} from worker {source}, which owns it")
            return None  # to an offer that has ended, or from a former owner
        match event, record.state:
            case KvReserved(), State.RESERVING:
                self._send(record, offer, event.start)
            case KvRefused(), State.RESERVING:
                self._stay(record, "refused")
            case KvReceived(), State.SENDING:
                self._received(record, offer, event)
                return event
            case KvFailed(), State.SENDING:
                record.transfer_failed = True
                self._unfreeze(record)
                self._stay(record, f"failed: {cause(event.reason)}")
            case _:
                raise record.bug(f"{event} from worker {source}")
        return None

    def withdraw(self, record: Record, outcome: str) -> None:
        """End the request's migration, if it has one, and release the destination's blocks."""
        if (offer := record.offer) is not None:
            self.registry.send(offer.dst, Release(record.request.id, offer.epoch))
            self._close_offer(record, offer, outcome)
        if record.moved_from is not None:
            self.recomputed(record, outcome)
        record.completed_plan = None

    def destination_lost(self, record: Record, why: str) -> None:
        """End the migration: the owner keeps the request and goes on decoding."""
        if record.state is State.SENDING:
            self._unfreeze(record)
        self._stay(record, why)

    def recomputed(self, record: Record, outcome: str) -> None:
        """End the current recompute migration."""
        src, record.moved_from = record.moved_from, None
        dst, _ = record.owner
        assert src is not None
        self._ended(record, src, dst, outcome)

    def resumed(self, record: Record) -> None:
        """Learn the downtime of a completed transfer, when the first token after it arrives."""
        plan, record.completed_plan = record.completed_plan, None
        assert plan is not None
        if record.last_token_s is not None:
            mode, hosts = PAUSE[plan.mode], self._hosts(plan.src, plan.dst)
            downtime_s = self.registry.view.now - record.last_token_s
            self.registry.estimates.record_move(mode, hosts, *plan.pause_parts_s, downtime_s)

    def _send(self, record: Record, offer: KvOffer, start: int) -> None:
        """RESERVING → SENDING: tell the source to send positions from `start` on.

        A `start` beyond that of the offer means that the destination has a cached prefix.
        """
        src, epoch = record.owner
        if start > offer.start:
            self._reduce(record, offer, start)
        record.move(State.SENDING, f"{offer.dst} has room")
        order = SendKv(record.request.id, epoch, offer.dst, offer.epoch, start)
        self.registry.send(src, order)

    def _reduce(self, record: Record, offer: KvOffer, start: int) -> None:
        """Reduce the plan, and the load that it puts on the link, to positions from `start` on."""
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
        self.registry.set_owner(record, offer.dst, offer.epoch)
        view = self.registry.view
        view.cost = view.cost.after_transfer(event.num_bytes, event.transfer_s)
        assert record.plan is not None
        record.completed_plan = record.plan
        self.registry.estimates.links.record_transfer(
            src, offer.dst, event.num_bytes + record.plan.shared_bytes, event.transfer_s, view.now
        )
        self._ended(record, src, offer.dst, "moved", event.num_bytes, event.transfer_s)

    def _unfreeze(self, record: Record) -> None:
        src, epoch = record.owner
        self.registry.send(src, Unfreeze(record.request.id, epoch))

    def _stay(self, record: Record, outcome: str) -> None:
        """The migration has failed and the destination needs no Release: back to RUNNING."""
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
            self.registry.estimates.record_move(
                plan.mode, self._hosts(src, dst), plan.wait_s, plan.work_s, took_s
            )
        ended = MigrationEnded(
            record.request.id, plan.mode, src, dst, num_bytes, transfer_s, outcome
        )
        self.registry.out.append((OBSERVER, ended))
