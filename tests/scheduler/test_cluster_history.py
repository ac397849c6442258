"""A cluster scheduler under random legal histories of events, with stale events in between."""

from collections import Counter, deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mellmpi.config import ClusterConfig
from mellmpi.protocol import (
    FRONT,
    OBSERVER,
    Assign,
    Cancel,
    DrainWorker,
    Emit,
    KvFailed,
    KvReceived,
    KvRefused,
    KvReserved,
    MigrationEnded,
    MigrationStarted,
    MoveRequest,
    OperatorAnswer,
    Park,
    Parked,
    ReceiveKv,
    Rejected,
    Release,
    SendKv,
    StepReport,
    Submit,
    UndrainWorker,
    Unfreeze,
    Wake,
    WorkerLost,
    WorkerReady,
    finish_reason,
)
from mellmpi.scheduler import ClusterScheduler, MoveProposal, WorkerState
from mellmpi.scheduler.policies import Policy
from mellmpi.scheduler.requests import State
from mellmpi.scheduler.view import Drain, ParkWorker, WakeWorker
from tests.scheduler.stage import KV, check, report, request

NUM_WORKERS, CAPACITY, MAX_SEQS = 3, 120, 3
WORKER = st.integers(1, NUM_WORKERS)
MODES = ["transfer"] * 3 + ["split", "recompute", None]
RARELY = st.sampled_from([False] * 7 + [True])


def answer(request_id: int) -> tuple[int, ...]:
    return tuple(10 * request_id + i for i in range(2 + request_id % 7))


@dataclass
class Held:
    """A sequence on a model worker."""

    request_id: int
    outputs: list[int]
    phase: str  # "running", "arriving" or "frozen"
    reported: int
    leaving: tuple[int, int] | None = None  # (destination, epoch there) while it is sent


@dataclass
class ModelWorker:
    """Handles commands in order and sends messages in order; keys sequences by epoch."""

    id: int
    inbox: deque = field(default_factory=deque)
    outbox: deque = field(default_factory=deque)
    held: dict[int, Held] = field(default_factory=dict)
    preempted: list[tuple[int, int]] = field(default_factory=list)
    ended: list[tuple[int, Held]] = field(default_factory=list)  # not reported yet
    acked: int = 0
    alive: bool = True
    parking: bool = False

    def free_bytes(self) -> int:
        known = [len(request(h.request_id).prompt) + len(h.outputs) for h in self.held.values()]
        return CAPACITY - sum(-(-n // KV.block_size) * KV.block_bytes for n in known)

    def handle(self, command, links, fits: bool) -> None:
        self.acked += 1
        match command:
            case Assign(r, epoch, outputs):
                self.held[epoch] = Held(r.id, list(outputs), "running", len(outputs))
                if not fits:
                    self.preempt(epoch)
            case ReceiveKv(r, epoch, _, num_logged, _, start, outputs):
                assert not start or len(outputs) == num_logged
                if fits:
                    self.held[epoch] = Held(r.id, [], "arriving", num_logged)
                answer = KvReserved(r.id, epoch, start) if fits else KvRefused(r.id, epoch)
                self.outbox.append(answer)
            case SendKv(_, epoch, dst, dst_epoch):
                if (held := self.held.get(epoch)) is not None:
                    assert held.leaving is None, "sent twice at once"
                    held.leaving = (dst, dst_epoch)
            case Unfreeze(_, epoch) if epoch in self.held:
                assert self.held[epoch].leaving, "unfrozen without having been sent"
                self.held[epoch].phase, self.held[epoch].leaving = "running", None
            case Release(_, epoch):
                self.held.pop(epoch, None)
            case Park():
                assert not self.held, "parked with requests"
                self.report()
                self.outbox.append(Parked(self.acked))
            case Wake():
                self.outbox.append(
                    WorkerReady((KV,), CAPACITY, MAX_SEQS, self.acked, 0.1, 64, None, (), "")
                )

    def stop(self, epoch: int, links) -> None:
        """Stop decoding and send the last round."""
        held = self.held[epoch]
        dst, dst_epoch = held.leaving
        held.phase = "frozen"
        links[self.id, dst].append((dst_epoch, held.request_id, tuple(held.outputs)))

    def streaming(self) -> list[int]:
        return [epoch for epoch in self.running() if self.held[epoch].leaving]

    def arrive(self, epoch: int, request_id: int, outputs, ok: bool) -> None:
        if (held := self.held.get(epoch)) is None:
            return  # it has been released
        assert held.phase == "arriving"
        if ok:
            held.outputs, held.phase = list(outputs), "running"
            first, held.reported = held.reported, len(outputs)
            run = tuple(outputs[first:])
            self.outbox.append(KvReceived(request_id, epoch, first, run, (), 10, 0.1))
        else:
            del self.held[epoch]
            self.outbox.append(KvFailed(request_id, epoch, "checksum"))

    def preempt(self, epoch: int) -> None:
        held = self.held.pop(epoch)
        self.ended.append((epoch, held))
        self.preempted.append((held.request_id, epoch))

    def token(self, epoch: int) -> None:
        held = self.held[epoch]
        held.outputs.append(answer(held.request_id)[len(held.outputs)])
        if len(held.outputs) == len(answer(held.request_id)):
            self.ended.append((epoch, self.held.pop(epoch)))

    def running(self) -> list[int]:
        return [epoch for epoch, held in self.held.items() if held.phase == "running"]

    def report(self) -> None:
        runs = []
        for epoch, held in [*self.held.items(), *self.ended]:
            if held.phase != "arriving" and held.outputs[held.reported :]:
                run = tuple(held.outputs[held.reported :])
                runs.append((held.request_id, epoch, held.reported, run))
                held.reported = len(held.outputs)
        free = self.free_bytes() // KV.block_bytes
        preempted = tuple(self.preempted)
        self.outbox.append(report(*runs, acked=self.acked, free_blocks=free, preempted=preempted))
        self.preempted, self.ended = [], []


class ClusterHistory(RuleBasedStateMachine):
    """Rank 0 and model workers. Each link is first in, first out; links are not synchronized."""

    def __init__(self):
        super().__init__()
        self.place_nowhere = False
        self.proposals = []
        policy = Policy(self.place, lambda view: self.proposals)
        self.scheduler = ClusterScheduler(NUM_WORKERS, ClusterConfig(rebalance_every_s=0.5), policy)
        self.workers = {w: ModelWorker(w) for w in range(1, NUM_WORKERS + 1)}
        self.links = {(a, b): deque() for a in self.workers for b in self.workers}
        self.emitted, self.over, self.next_id = {}, {}, 0
        self.epochs, self.moving, self.answers = set(), Counter(), 0
        self.now = 0.0
        for worker in self.workers.values():
            ready = WorkerReady((KV,), CAPACITY, MAX_SEQS, 0, 0.1, 64, None, (), "")
            self.deliver(worker.id, ready)

    def place(self, view, row, model):
        ledger = view.workers
        room = view.hosting(model) & (ledger.num_requests < MAX_SEQS)
        room &= ledger.budget >= view.requests.need(row)
        found = [] if self.place_nowhere else room.nonzero()[0].tolist()
        return found[view.tick % len(found)] if found else None

    # --- events and commands of rank 0 ----------------------------------------------------------

    def deliver(self, source, event):
        self.now += 0.01
        self.carry_out(self.scheduler.handle(source, event, self.now))

    def carry_out(self, commands):
        for to, command in commands:
            if isinstance(command, OperatorAnswer):
                self.answers += 1
            elif to == FRONT:
                self.front(command)
            elif to == OBSERVER:
                self.observe(command)
            else:
                assert self.scheduler.registry.ledger.state[to] != WorkerState.LOST
                held = self.scheduler.registry.ledger.held[to]
                assert not held or not isinstance(command, Assign | ReceiveKv | Wake)
                if isinstance(command, Assign | ReceiveKv):
                    assert command.epoch not in self.epochs, "an epoch was used again"
                    self.epochs.add(command.epoch)
                self.workers[to].inbox.append(command)

    def front(self, command):
        assert command.request_id not in self.over, "a message after the end of the request"
        match command:
            case Emit(request_id, first, tokens, _, reason):
                outputs = self.emitted[request_id]
                assert first == len(outputs) and tokens
                outputs += tokens
                assert tuple(outputs) == answer(request_id)[: len(outputs)]
                assert reason == finish_reason(self.requests(request_id), outputs)
                if reason:
                    self.over[request_id] = "finished"
            case Rejected(request_id):
                self.over[request_id] = "rejected"

    def observe(self, command):
        match command:
            case MigrationStarted(request_id):
                self.moving[request_id] += 1
                assert self.moving[request_id] == 1, "two moves at once"
            case MigrationEnded(request_id):
                self.moving[request_id] -= 1
                assert self.moving[request_id] == 0, "ended twice"

    def requests(self, request_id):
        return request(request_id, max_tokens=len(answer(request_id)))

    # --- clients --------------------------------------------------------------------------------

    @rule()
    def submit(self):
        self.next_id += 1
        self.emitted[self.next_id] = []
        self.deliver(FRONT, Submit(self.requests(self.next_id)))

    @precondition(lambda self: self.next_id)
    @rule(data=st.data(), happens=RARELY)
    def cancel(self, data, happens):
        if not happens:
            return
        request_id = data.draw(st.integers(1, self.next_id))
        self.over.setdefault(request_id, "cancelled")
        self.deliver(FRONT, Cancel(request_id, "gone"))
        assert request_id not in self.scheduler.records

    # --- an operator ----------------------------------------------------------------------------

    def operate(self, command):
        self.answers = 0
        self.deliver(FRONT, command)
        assert self.answers == 1

    @rule(w=st.integers(0, NUM_WORKERS + 1), happens=RARELY)
    def drain(self, w, happens):
        if happens:
            self.operate(DrainWorker(w))

    @rule(w=WORKER)
    def undrain(self, w):
        self.operate(UndrainWorker(w))

    @precondition(lambda self: self.next_id)
    @rule(data=st.data(), w=WORKER)
    def move_one(self, data, w):
        self.operate(MoveRequest(data.draw(st.integers(1, self.next_id)), w))

    # --- workers --------------------------------------------------------------------------------

    @rule(
        w=WORKER,
        commands=st.integers(0, 3),
        messages=st.integers(0, 3),
        fits=st.integers(0, 7),
        data=st.data(),
    )
    def work(self, w, commands, messages, fits, data):
        """Handle commands, perhaps decode or preempt, and deliver messages to rank 0."""
        worker = self.workers[w]
        if not worker.alive:
            return
        for _ in range(min(commands, len(worker.inbox))):
            worker.handle(worker.inbox.popleft(), self.links, bool(fits))
        for epoch in worker.running():
            match data.draw(st.sampled_from("tttttssp")):
                case "t":
                    worker.token(epoch)
                case "p":
                    worker.preempt(epoch)
        for epoch in worker.streaming():
            if data.draw(st.booleans()):
                worker.stop(epoch, self.links)
        if data.draw(st.booleans()):
            worker.report()
        self.deliver_from(w, messages)

    work_2, work_3 = work, work  # three times as likely as any other rule

    def deliver_from(self, w, n):
        outbox = self.workers[w].outbox
        for _ in range(min(n, len(outbox))):
            self.deliver(w, outbox.popleft())

    @precondition(lambda self: any(self.links.values()))
    @rule(data=st.data(), ok=st.integers(0, 5))
    def transfer(self, data, ok):
        a, b = data.draw(st.sampled_from([key for key, link in self.links.items() if link]))
        payload = self.links[a, b].popleft()
        if self.workers[b].alive:
            self.workers[b].arrive(*payload, ok=bool(ok))

    @precondition(lambda self: sum(w.alive for w in self.workers.values()) > 1)
    @rule(w=WORKER, messages=st.integers(0, 9), happens=RARELY)
    def lose(self, w, messages, happens):
        if self.workers[w].alive and happens:
            self.deliver_from(w, messages)
            self.workers[w].alive = False
            self.deliver(w, WorkerLost(w))

    # --- the policy -----------------------------------------------------------------------------

    @precondition(lambda self: self.movable())
    @rule(data=st.data(), w=WORKER, mode=st.sampled_from(MODES))
    def move(self, data, w, mode):
        self.proposals = [MoveProposal(data.draw(st.sampled_from(self.movable())), w, "test", mode)]
        self.tick()

    def movable(self):
        return [id for id, r in self.scheduler.records.items() if r.state is State.RUNNING]

    @rule(w=WORKER, luck=st.integers(0, 19))
    def propose(self, w, luck):
        """Mostly no proposal: a cluster with parked workers exercises little."""
        kinds = {16: Drain, 17: ParkWorker, 18: WakeWorker}
        self.proposals = [kinds[luck](w)] if luck in kinds else []
        self.place_nowhere = luck in (9, 10)
        self.tick()

    def tick(self):
        self.now += 1.0
        self.carry_out(self.scheduler.tick(self.now))
        self.proposals = []

    # --- stale events ---------------------------------------------------------------------------

    @precondition(lambda self: self.epochs)
    @rule(
        data=st.data(),
        kind=st.sampled_from(
            [KvReserved, KvRefused, KvFailed, KvReceived, StepReport, "preempted"]
        ),
    )
    def stale(self, data, kind):
        """An event under an epoch that has ended changes nothing."""
        current = {r.epoch for r in self.scheduler.records.values()}
        current |= {r.offer.epoch for r in self.scheduler.records.values() if r.offer}
        old = sorted(self.epochs - current)
        alive = [w for w, worker in self.workers.items() if worker.alive]
        if not old:
            return
        epoch, w = data.draw(st.sampled_from(old)), data.draw(st.sampled_from(alive))
        id = data.draw(st.integers(1, self.next_id))
        ledger = self.scheduler.registry.ledger
        unchanged = {"acked": 0, "free_blocks": int(ledger.free[w]) // KV.block_bytes}
        event = {
            KvReserved: KvReserved(id, epoch, 0),
            KvRefused: KvRefused(id, epoch),
            KvFailed: KvFailed(id, epoch, "stale"),
            KvReceived: KvReceived(id, epoch, 0, (99,), (), 0, 0.0),
            StepReport: report((id, epoch, 0, (99, 98)), **unchanged),
            "preempted": report(preempted=((id, epoch),), **unchanged),
        }[kind]
        before = self.record_states()
        nowhere, self.place_nowhere = self.place_nowhere, True
        states = ledger.state.copy()
        self.deliver(w, event)
        self.place_nowhere = nowhere
        assert self.record_states() == before
        changed = (ledger.state != states).nonzero()[0]  # a waiting queue may still wake a worker
        assert not len(changed) or self.scheduler.queue

    def record_states(self):
        return {
            id: (r.state, r.worker, r.epoch, r.offer, list(r.log.tokens))
            for id, r in self.scheduler.records.items()
        }

    # --- invariants -----------------------------------------------------------------------------

    @invariant()
    def records_columns_queue_and_ledger_agree(self):
        check(self.scheduler)

    @invariant()
    def at_most_one_worker_computes_a_request_and_rank_0_knows_it(self):
        for id, record in self.scheduler.records.items():
            holders = [
                (w.id, e)
                for w in self.workers.values()
                if w.alive
                for e, h in w.held.items()
                if h.request_id == id and h.phase == "running"
            ]
            unreleased = [
                h
                for h in holders
                if not any(
                    isinstance(c, Release) and c.epoch == h[1] for c in self.workers[h[0]].inbox
                )
            ]
            # The second is a destination whose KvReceived has not arrived yet.
            assert len(unreleased) <= 1 + (record.state is State.SENDING)
            if record.state is State.RUNNING and unreleased:
                assert unreleased == [record.owner]

    @invariant()
    def observed_migrations_match_the_records(self):
        for id, record in self.scheduler.records.items():
            open_ = record.offer is not None or record.moved_from is not None
            assert self.moving[id] == open_
        assert not any(n for id, n in self.moving.items() if id not in self.scheduler.records)

    @invariant()
    def ended_requests_have_no_record(self):
        assert self.scheduler.records.keys() == self.emitted.keys() - self.over.keys()

    def teardown(self):
        """Without further rules every request ends, and no state is left."""
        self.place_nowhere = False
        for w in self.workers:
            self.operate(UndrainWorker(w))
        for _ in range(200):
            if not self.scheduler.records and not any(self.pending()):
                break
            for worker in (w for w in self.workers.values() if w.alive):
                while worker.inbox:
                    worker.handle(worker.inbox.popleft(), self.links, fits=True)
                for epoch in worker.running():
                    worker.token(epoch)
                for epoch in worker.streaming():
                    worker.stop(epoch, self.links)
                worker.report()
                while worker.outbox:
                    self.deliver(worker.id, worker.outbox.popleft())
            for (_, b), link in self.links.items():
                while link and self.workers[b].alive:
                    self.workers[b].arrive(*link.popleft(), ok=True)
            self.tick()
        assert not self.scheduler.records, [r.bug("stuck") for r in self.scheduler.records.values()]
        check(self.scheduler)
        for worker in self.workers.values():
            assert not worker.alive or not worker.held, "a sequence was never released"
        for id, outputs in self.emitted.items():
            if self.over[id] == "finished":
                assert tuple(outputs) == answer(id)
        assert "rejected" not in self.over.values()

    def pending(self):
        alive = [w for w in self.workers.values() if w.alive]
        return [w.inbox or w.outbox or w.held for w in alive] + [
            link for (_, b), link in self.links.items() if self.workers[b].alive
        ]


TestClusterHistory = ClusterHistory.TestCase
TestClusterHistory.settings = settings(max_examples=200, stateful_step_count=80)
