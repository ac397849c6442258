"""A live move that comes to nothing, broken off after each turn of it: whatever broke it off, the
answer is right, rank 0's books agree at any time, and in the end nobody holds anything."""

from dataclasses import replace

import pytest

from mellmpi.costs import StepBudget
from mellmpi.protocol import Cancel
from mellmpi.runtime import worker as loops
from mellmpi.scheduler import MoveProposal
from mellmpi.scheduler import planner as migration
from mellmpi.scheduler.requests import State
from mellmpi.sim.executor import expected_outputs
from mellmpi.transport import local
from mellmpi.transport.local import LocalTransport
from mellmpi.worker.sequences import Phase
from tests.runtime.cell import HashArena, ListFront, hashing, request
from tests.scheduler.stage import assert_nothing_left, check

MOVING, SRC, DST = 7, 1, 2
WHILE = 25  # turns without room, then there is room again
PART, SMALL_STEP = 8, 2  # positions that the destination of a split computes, in all and at once
SETTLE = 60  # turns after the last answer: what is under way comes to its end


class Front(ListFront):
    """A front that can cancel."""

    def __init__(self, requests):
        super().__init__(requests)
        self.cancels = []

    def inbox(self, now):
        cancels, self.cancels = self.cancels, []
        return super().inbox(now) + cancels

    def deliver(self, command):
        if command.request_id not in self.ended:  # else it was on its way when it was cancelled
            super().deliver(command)


class Scene:
    """Three workers; request 7 begins on the first and is moved to the second, beside others.

    Blocks arrive one a turn of the destination. `spoil` and `cut` hit what is sent next. A part to
    be computed takes longer than the first blocks.
    """

    def __init__(self, mode, monkeypatch, max_tokens=20):
        monkeypatch.setattr(local, "PIECE_BYTES", 1)
        monkeypatch.setattr(loops, "REPORT_EVERY_S", 4e-4)
        self.cell = hashing(3, num_blocks=40, migrate="never", policy="worst_fit")
        self.cell.network.checksums = True
        if mode == "split":
            monkeypatch.setattr(migration, "split_at", lambda *_: PART)
            batch = self.cell.workers[DST]._batch
            batch._budget = StepBudget(SMALL_STEP)
        self.scheduler, self.network = self.cell.scheduler, self.cell.network
        self.mode, self.begun, self.spoil, self.cut = mode, False, False, False
        self.scheduler.policy = replace(self.scheduler.policy, rebalance=self._once)
        sizes = {MOVING: (22, max_tokens), 8: (5, 16), 9: (9, 12)}
        self.requests = [request(i, *size) for i, size in sizes.items()]
        self.front = Front(self.requests)
        self.later = {}  # turn -> what to do then
        self.num_turns = 0
        monkeypatch.setattr(LocalTransport, "_copy", self._copying(LocalTransport._copy))
        monkeypatch.setattr(
            LocalTransport, "send_blocks", self._sending(LocalTransport.send_blocks)
        )

    def _once(self, view):
        record = self.record
        if self.begun or record is None or len(record.log.tokens) < 2 or not record.settled:
            return []  # it would not be split yet
        self.begun = True
        return [MoveProposal(MOVING, DST, "test", self.mode)]

    def _copying(self, copy):
        def copying(transport, offer, want):
            if self.spoil and want.arena is not None:
                self.spoil, sent = False, offer.arena.array.copy()
                sent[offer.block_ids[0]].view("u1")[3] ^= 1
                offer = replace(offer, arena=HashArena(sent))
            copy(transport, offer, want)

        return copying

    def _sending(self, send):
        def sending(transport, dst, tag, block_ids):
            if cut := self.cut and len(block_ids) > 1:
                self.cut = False
            return send(transport, dst, tag, block_ids[:-1] if cut else block_ids)

        return sending

    # --- what there is --------------------------------------------------------------------------

    @property
    def record(self):
        return self.scheduler.records.get(MOVING)

    def batch(self, worker):
        return self.cell.workers[worker]._batch

    @property
    def _announced(self):
        return self.batch(SRC)._departures._announced

    def sequence(self, worker):
        live = self.batch(worker).sequences.values()
        return next((s for s in live if s.request.id == MOVING), None)

    @property
    def point(self):
        """How far the move has come, in words; None: there is none."""
        record, source, there = self.record, self.sequence(SRC), self.sequence(DST)
        if record is None or record.state not in (State.RESERVING, State.SENDING):
            return None
        if record.state is State.RESERVING:
            return "reserved" if there else "asked"
        if there is not None and there.arrival is None:
            return "arrived"
        if source is not None and source.phase is Phase.FROZEN:
            return "stopped"
        if source in [sequence for sequence, _ in self._announced]:
            return "waiting"  # for the destination's own part: for a step none is seen to wait
        return "streaming" if source is not None and source.sending else "ordered"

    # --- what happens ---------------------------------------------------------------------------

    def turns(self):
        """Turns of all processes in rotation; rank 0's books agree after each."""
        processes = [lambda: self.cell.loop.turn(self.front)]
        processes += [lambda w=w: self._work(w) for w in self.cell.workers]
        while True:
            for turn in processes:
                turn()
                check(self.scheduler)
                self.num_turns += 1
                self.later.pop(self.num_turns, lambda: None)()
                yield

    def _work(self, worker):
        if worker not in self.network.lost:
            self.cell.workers[worker].turn()

    def run(self, turns, done, limit=6000):
        for _ in range(limit):
            if done():
                return
            next(turns)
        raise AssertionError([r.bug("open") for r in self.scheduler.records.values()])

    def check_answers(self):
        for r in self.requests:
            outputs, expected = self.front.outputs[r.id], expected_outputs(r)
            cut = self.front.ended[r.id] == "gone"
            assert outputs == (expected[: len(outputs)] if cut else expected), r.id

    def check_nothing_left(self):
        assert_nothing_left(self.scheduler)
        assert not any(self.scheduler.registry.in_flight.bytes_between.values())
        for worker, loop in self.cell.workers.items():
            if worker not in self.network.lost:
                batch = loop._batch
                assert not batch.sequences and not batch.lingering and not loop._transfers
                assert batch.pool.num_free == batch.pool.num_blocks, f"worker {worker} leaks"
                assert not self.network.inboxes[worker].offers, "blocks that nobody took"


# --- what may break a move off: False where it cannot happen at this point ------------------------


def cancelled(scene):
    scene.front.cancels.append(Cancel(MOVING, "gone"))
    scene.front.ended[MOVING] = "gone"


def preempted(scene):
    source = scene.sequence(SRC)
    if source is None or source.phase is not Phase.RUNNING or source.in_flight:
        return False
    scene.batch(SRC)._preempt(source)


def _no_room(scene, worker):
    pool = scene.batch(worker).pool
    ids = pool.take(pool.num_free)
    scene.later[scene.num_turns + WHILE] = lambda: pool.give(ids)


def source_out_of_room(scene):
    _no_room(scene, SRC)


def destination_out_of_room(scene):
    _no_room(scene, DST)


def source_lost(scene):
    scene.network.lose(SRC)


def destination_lost(scene):
    scene.network.lose(DST)


def checksum_wrong(scene):
    scene.spoil = True


def stream_truncated(scene):
    scene.cut = True


def another_layout(scene):
    scene.batch(DST).holdings.fingerprints["hash"] = "another"


ABORTS = [
    cancelled,
    preempted,
    source_out_of_room,
    destination_out_of_room,
    source_lost,
    destination_lost,
    checksum_wrong,
    stream_truncated,
    another_layout,
]
POINTS = {"asked", "reserved", "ordered", "streaming", "stopped", "arrived"}
# Nobody preempts what a transfer reads, and what has stopped needs no further block.
BEFORE_BLOCKS = {"asked", "reserved", "ordered"}
OUTCOMES = {
    cancelled: {"cancelled"},
    preempted: {"preempted"},
    source_out_of_room: set(),
    destination_out_of_room: {"refused", "failed: no room"},
    source_lost: {"worker 1 lost"},
    destination_lost: {"worker 2 lost"},
    checksum_wrong: {"failed: checksum"},
    stream_truncated: {"failed: truncated"},
    another_layout: {"failed: KV layout"},
}


def broken_off(scene, abort, after):
    """Break the move off after so many turns of it; where it was then, None if it was over."""
    turns = scene.turns()
    scene.run(turns, lambda: scene.point is not None)
    for _ in range(after):
        next(turns)
    point = scene.point
    if point is not None and abort(scene) is False:
        point = "not possible"
    scene.run(turns, lambda: scene.front.done)
    for _ in range(SETTLE):
        next(turns)
    scene.check_answers()
    scene.check_nothing_left()
    return point


@pytest.mark.parametrize("mode", ["transfer", "split"])
@pytest.mark.parametrize("abort", ABORTS, ids=lambda abort: abort.__name__)
def test_broken_off_at_any_point_a_move_leaves_one_owner_and_no_leak(abort, mode, monkeypatch):
    points, outcomes = set(), set()
    for after in range(1000):
        with monkeypatch.context() as patch:
            scene = Scene(mode, patch)
            point = broken_off(scene, abort, after)
        if point is None:
            break
        points.add(point)
        outcomes |= scene.cell.metrics.report(1.0)["migration_outcomes"].keys()
    waiting = {"waiting"} if mode == "split" else set()
    assert points >= (BEFORE_BLOCKS if abort is preempted else POINTS | waiting), points
    assert outcomes >= OUTCOMES[abort], outcomes


@pytest.mark.parametrize("mode", ["transfer", "split"])
def test_finished_at_any_point_a_moving_request_leaves_nothing(mode, monkeypatch):
    outcomes = set()
    for max_tokens in range(3, 30):
        with monkeypatch.context() as patch:
            scene = Scene(mode, patch, max_tokens)
            turns = scene.turns()
            scene.run(turns, lambda scene=scene: scene.front.done)
            for _ in range(SETTLE):
                next(turns)
        scene.check_answers()
        scene.check_nothing_left()
        outcomes |= scene.cell.metrics.report(1.0)["migration_outcomes"].keys()
    assert outcomes == {"finished", "moved"}
