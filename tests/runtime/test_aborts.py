"""Live migrations aborted after each of their loop iterations, for every reason.

The answer is right, the scheduler's state is consistent at any time, and at the end no worker holds
KV.
"""

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
NO_ROOM = 25  # iterations without free blocks
PART, SMALL_STEP = 8, 2  # positions that the destination of a split computes, in all and per step
DRAIN = 60  # iterations after the last answer, for messages and transfers in flight


class Front(ListFront):
    """A front that can cancel."""

    def __init__(self, requests):
        super().__init__(requests)
        self.cancels = []

    def inbox(self, now):
        cancels, self.cancels = self.cancels, []
        return super().inbox(now) + cancels

    def deliver(self, command):
        if command.request_id not in self.ended:  # else sent before the cancel
            super().deliver(command)


class Scene:
    """Three workers. Request 7 starts on worker 1 and migrates to worker 2, beside other requests.

    One block arrives per iteration of the destination. `spoil` corrupts the next block, `cut`
    shortens the next transfer. The part that a split computes takes longer than the first blocks.
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
        placement = self.scheduler.placement
        placement.policy = replace(placement.policy, rebalance=self._once)
        sizes = {MOVING: (22, max_tokens), 8: (5, 16), 9: (9, 12)}
        self.requests = [request(i, *size) for i, size in sizes.items()]
        self.front = Front(self.requests)
        self.later = {}  # iteration -> function to call then
        self.num_iterations = 0
        monkeypatch.setattr(LocalTransport, "_copy", self._copying(LocalTransport._copy))
        monkeypatch.setattr(
            LocalTransport, "send_blocks", self._sending(LocalTransport.send_blocks)
        )

    def _once(self, view):
        record = self.record
        if self.begun or record is None or len(record.log.tokens) < 2 or not record.has_progressed:
            return []  # too early for a split
        self.begun = True
        return [MoveProposal(MOVING, DST, "test", self.mode)]

    def _copying(self, copy):
        def copying(transport, send, receive):
            if self.spoil and receive.arena is not None:
                self.spoil, sent = False, send.arena.array.copy()
                sent[send.block_ids[0]].view("u1")[3] ^= 1
                send = replace(send, arena=HashArena(sent))
            copy(transport, send, receive)

        return copying

    def _sending(self, send):
        def sending(transport, dst, tag, block_ids):
            if cut := self.cut and len(block_ids) > 1:
                self.cut = False
            return send(transport, dst, tag, block_ids[:-1] if cut else block_ids)

        return sending

    # --- state ----------------------------------------------------------------------------------

    @property
    def record(self):
        return self.scheduler.records.get(MOVING)

    def batch(self, worker):
        return self.cell.workers[worker]._batch

    @property
    def _announced(self):
        return self.batch(SRC)._sender._announced

    def sequence(self, worker):
        live = self.batch(worker).sequences.values()
        return next((s for s in live if s.request.id == MOVING), None)

    @property
    def stage(self):
        """The stage of the migration, in words; None: there is none."""
        record, source, target = self.record, self.sequence(SRC), self.sequence(DST)
        if record is None or record.state not in (State.RESERVING, State.SENDING):
            return None
        if record.state is State.RESERVING:
            return "reserved" if target else "asked"
        if target is not None and target.incoming is None:
            return "arrived"
        if source is not None and source.phase is Phase.FROZEN:
            return "stopped"
        if source in [sequence for sequence, _ in self._announced]:
            return "waiting"  # for the part that the destination computes
        return "streaming" if source is not None and source.sending else "ordered"

    # --- actions --------------------------------------------------------------------------------

    def iterations(self):
        """Run the loops of all processes round-robin; check the scheduler after each iteration."""
        processes = [lambda: self.cell.loop.run_once(self.front)]
        processes += [lambda w=w: self._work(w) for w in self.cell.workers]
        while True:
            for run_once in processes:
                run_once()
                check(self.scheduler)
                self.num_iterations += 1
                self.later.pop(self.num_iterations, lambda: None)()
                yield

    def _work(self, worker):
        if worker not in self.network.lost:
            self.cell.workers[worker].run_once()

    def run(self, iterations, done, limit=6000):
        for _ in range(limit):
            if done():
                return
            next(iterations)
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
                assert not self.network.inboxes[worker].sends, "blocks that were not received"


# --- reasons for an abort. False: not possible at this stage --------------------------------------


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
    ids = pool.allocate(pool.num_free)
    scene.later[scene.num_iterations + NO_ROOM] = lambda: pool.free(ids)


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
    scene.batch(DST).table.fingerprints["hash"] = "another"


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
STAGES = {"asked", "reserved", "ordered", "streaming", "stopped", "arrived"}
# A sequence that a transfer reads cannot be preempted, and a stopped one needs no more blocks.
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


def aborted(scene, abort, after):
    """Abort the migration after some iterations. Returns its stage then; None: it had ended."""
    iterations = scene.iterations()
    scene.run(iterations, lambda: scene.stage is not None)
    for _ in range(after):
        next(iterations)
    stage = scene.stage
    if stage is not None and abort(scene) is False:
        stage = "not possible"
    scene.run(iterations, lambda: scene.front.done)
    for _ in range(DRAIN):
        next(iterations)
    scene.check_answers()
    scene.check_nothing_left()
    return stage


@pytest.mark.parametrize("mode", ["transfer", "split"])
@pytest.mark.parametrize("abort", ABORTS, ids=lambda abort: abort.__name__)
def test_a_migration_aborted_at_any_stage_leaves_one_owner_and_no_leak(abort, mode, monkeypatch):
    stages, outcomes = set(), set()
    for after in range(1000):
        with monkeypatch.context() as patch:
            scene = Scene(mode, patch)
            stage = aborted(scene, abort, after)
        if stage is None:
            break
        stages.add(stage)
        outcomes |= scene.cell.metrics.report(1.0)["migration_outcomes"].keys()
    waiting = {"waiting"} if mode == "split" else set()
    assert stages >= (BEFORE_BLOCKS if abort is preempted else STAGES | waiting), stages
    assert outcomes >= OUTCOMES[abort], outcomes


@pytest.mark.parametrize("mode", ["transfer", "split"])
def test_a_request_that_ends_at_any_stage_of_its_migration_leaves_nothing(mode, monkeypatch):
    outcomes = set()
    for max_tokens in range(3, 30):
        with monkeypatch.context() as patch:
            scene = Scene(mode, patch, max_tokens)
            iterations = scene.iterations()
            scene.run(iterations, lambda scene=scene: scene.front.done)
            for _ in range(DRAIN):
                next(iterations)
        scene.check_answers()
        scene.check_nothing_left()
        outcomes |= scene.cell.metrics.report(1.0)["migration_outcomes"].keys()
    assert outcomes == {"finished", "moved"}
