"""The simulated cluster: properties that the fault histories rely on."""

import random

import numpy as np
import pytest

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.protocol import (
    BlocksArrived,
    BlocksSent,
    Chunk,
    DrainBlocks,
    ReceiveBlocks,
    SendBlocks,
    StepPlan,
)
from mellmpi.sim import Network, SimWorker, WorkerSpec
from mellmpi.sim.data_plane import DataPlane
from mellmpi.sim.executor import HashExecutor, expected_outputs
from tests.sim.histories import KV, random_history, random_request

SPEC = WorkerSpec((KV,), 8, BatchConfig(), CacheConfig(block_size=4), wake_s=0.1)


def test_a_link_never_reorders_but_two_links_may():
    network = Network(1.0, random.Random(0))
    arrivals = [network.arrival(1, 0, now) for now in range(50)]
    assert arrivals == sorted(arrivals) and len(set(arrivals)) < 50
    other = [network.arrival(2, 0, now) for now in range(50)]
    assert any(a > b for a, b in zip(arrivals, other[1:], strict=False))
    assert Network(0.0, random.Random(0)).arrival(1, 0, 5.0) == 5.0


def test_the_same_seed_gives_the_same_history():
    first, second = (random_history(11)[0].run() for _ in range(2))
    assert first.observed == second.observed and first.outputs == second.outputs


def decode(engine, request, table):
    outputs = []
    while len(outputs) < len(expected_outputs(request)):
        known = request.prompt + tuple(outputs)
        start = 0 if not outputs else len(known) - 1
        chunk = Chunk(request.id, start, known[start:], table, request.sampling, ((), []))
        outputs.append(engine.execute(StepPlan(KV.model, (chunk,), ())).tokens[0])
    return outputs


def test_tokens_depend_on_the_request_and_not_on_where_its_blocks_lie():
    request = random_request(1, random.Random(0))
    expected = expected_outputs(request)
    assert decode(HashExecutor(12, [KV]), request, list(range(12))) == expected
    scattered = [7, 3, 29, 0, 5, 6, 2, 1, 4, 8, 9, 10]
    assert decode(HashExecutor(30, [KV]), request, scattered) == expected


@pytest.mark.parametrize("position", range(6))
def test_any_wrong_position_of_the_cache_changes_the_next_token(position):
    def tokens(error):
        engine = HashExecutor(2, [KV])
        prefix = Chunk(1, 0, (1, 2, 3, 4, 5, 6), [0, 1], None, ((), []))
        engine.execute(StepPlan(KV.model, (prefix,), ()))
        engine.arena[divmod(position, 4)] += np.uint64(error)
        sampling = random_request(1, random.Random(0)).sampling
        last = Chunk(1, 6, (7,), [0, 1], sampling, ((), []))
        return engine.execute(StepPlan(KV.model, (last,), ())).tokens

    assert any(tokens(error) != tokens(0) for error in (1, 2, 3))


class Wire:
    """Two workers with four held blocks each, their data plane, and its results."""

    def __init__(self):
        self.workers = {w: SimWorker(w, SPEC) for w in (1, 2)}
        for worker in self.workers.values():
            worker.batch.pool.allocate(4)
        self.actions, self.results = [], []
        self.plane = DataPlane(
            self.workers,
            block_s=lambda: 0.5,
            later=lambda delay, action: self.actions.append(action),
            deliver=lambda worker, event: self.results.append((worker.id, event)),
        )

    def start(self, order):
        self.plane.handle(self.workers[1], SendBlocks(7, 1, 2, 9, (0, 1)), 0.0)
        self.plane.handle(self.workers[2], order, 0.0)

    def run(self):
        while self.actions:
            self.actions.pop(0)()


RECEIVE, DRAIN = ReceiveBlocks(7, 9, 1, 9, (2, 3)), DrainBlocks(1, 9, 2)


@pytest.fixture
def wire():
    return Wire()


def test_blocks_arrive_unchanged_and_both_workers_get_a_result(wire):
    wire.workers[1].executor.arena[:2] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    wire.start(RECEIVE)
    wire.run()
    assert wire.workers[2].executor.arena[2:4].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert wire.results == [(1, BlocksSent(7, 1, 9)), (2, BlocksArrived(7, 9, True, 0.0, 9, ""))]


def test_drained_blocks_are_discarded_and_only_the_sender_gets_a_result(wire):
    wire.workers[1].executor.arena[:2] = 5
    wire.start(DRAIN)
    wire.run()
    assert not wire.workers[2].executor.arena.any() and wire.results == [(1, BlocksSent(7, 1, 9))]


@pytest.mark.parametrize(
    ("lost", "results"),
    [
        (1, [(1, BlocksSent(7, 1, 9)), (2, BlocksArrived(7, 9, False, 0.0, 9, "peer lost"))]),
        (2, [(1, BlocksSent(7, 1, 9)), (2, BlocksArrived(7, 9, False, 0.0, 9, "peer lost"))]),
    ],
)
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_transfer_with_a_lost_worker_ends(wire, lost, results, when):
    if when == "before":
        wire.workers[lost].alive = False
        wire.plane.handle(
            wire.workers[3 - lost], RECEIVE if lost == 1 else SendBlocks(7, 1, 2, 9, (0, 1)), 0.0
        )
        assert wire.results == [results[1 if lost == 1 else 0]]
    else:
        wire.start(RECEIVE)
        wire.plane.worker_lost(lost)
        wire.run()
        assert wire.results == results
    assert not wire.plane.sends and not wire.plane.receives


@pytest.mark.parametrize("worker", [1, 2])
def test_a_block_in_transfer_that_is_not_held_is_detected(wire, worker):
    wire.start(RECEIVE)
    wire.workers[worker].batch.pool.free([0, 1, 2, 3])
    with pytest.raises(AssertionError, match="is not held"):
        wire.run()


@pytest.mark.parametrize("order", [RECEIVE, DRAIN])
def test_a_block_written_while_it_is_sent_is_detected(wire, order):
    wire.start(order)
    wire.workers[1].executor.arena[1] += np.uint64(1)
    with pytest.raises(AssertionError, match="written while it was sent"):
        wire.run()


def test_a_history_without_end_is_a_livelock():
    sim, _ = random_history(0)
    sim.max_events = 10
    with pytest.raises(RuntimeError, match="10 events and no end"):
        sim.run()
