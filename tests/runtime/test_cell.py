"""The main loops and the local transport, with an engine whose tokens depend on the KV."""

from types import SimpleNamespace

import pytest

from mellmpi.protocol import ROUNDS, Assign, KvPayload, ReceiveKv, SendKv, StepReport
from mellmpi.runtime import worker as worker_module
from mellmpi.sim.executor import expected_outputs, prompt_logprobs
from mellmpi.transport import Transfer
from tests.runtime.cell import ListFront, hashing, request

REQUESTS = [
    request(i, 3 + i % 7, 10 + 5 * (i % 9), num_prompt_logprobs=0 if i % 3 == 0 else None)
    for i in range(40)
]


def answers_are_right(front):
    for r in REQUESTS:
        assert front.outputs[r.id] == expected_outputs(r), f"request {r.id}"
        scored = prompt_logprobs(r.prompt[1:], 1) if r.id % 3 == 0 else ()
        assert front.prompt_logprobs[r.id] == list(scored), f"prompt of {r.id}"


@pytest.mark.parametrize("policy", ["best_fit", "worst_fit", "frugal"])
@pytest.mark.parametrize("migrate", ["never", "auto", "stress"])
def test_answers_do_not_depend_on_migrations(policy, migrate):
    cell, front = hashing(3, num_blocks=60, policy=policy, migrate=migrate), ListFront(REQUESTS)
    cell.run(front)
    answers_are_right(front)
    moved = cell.metrics.report(1.0)["migrations"]
    if migrate == "stress":
        assert all(moved[mode] > 0 for mode in ("transfer", "recompute", "split")), moved
    if migrate == "never":
        assert moved["transfer"] == moved["recompute"] == 0


def test_requests_of_a_lost_worker_are_finished_by_the_others():
    cell = hashing(3, num_blocks=60, migrate="stress", policy="worst_fit")
    front = ListFront(REQUESTS)
    cell.run(front, until=lambda: sum(map(len, front.outputs.values())) > 200)
    cell.network.lose(2)
    cell.run(front)
    answers_are_right(front)
    assert cell.metrics.report(1.0)["workers_lost"] == 1


def test_when_every_worker_is_lost_the_requests_end():
    cell, front = hashing(2, num_blocks=60), ListFront([request(1, 4, 200), request(2, 4, 200)])
    cell.run(front, until=lambda: sum(map(len, front.outputs.values())) > 5)
    cell.network.lose(1)
    cell.network.lose(2)
    cell.run(front)
    assert cell.loop.all_lost() and set(front.ended.values()) - {"length"}


def test_a_parked_worker_releases_its_engine_and_wakes_for_new_load():
    cell = hashing(2, num_blocks=20, policy="frugal")
    first = ListFront([request(1, 4, 8)])
    cell.run(first)
    idle = ListFront([request(2, 4, 8)])  # its request is dropped, so that `run` goes on
    idle.inbox(0.0)
    parked = lambda: sum(w._engine is None for w in cell.workers.values()) == 1  # noqa: E731
    cell.run(idle, until=parked)
    for worker, transport in zip(cell.workers.values(), cell.network.transports[1:], strict=True):
        assert (worker._engine is None) == (transport._arena is None)
    many = ListFront([request(10 + i, 8, 24) for i in range(8)])
    cell.run(many, until=lambda: all(w._engine is not None for w in cell.workers.values()))
    cell.run(many)
    assert all(many.outputs[i] == expected_outputs(request(i, 8, 24)) for i in many.outputs)


def test_orders_from_before_parking_do_not_count_as_unread_after_the_wake_up():
    """Otherwise the scheduler would count their blocks as ordered forever."""
    cell = hashing(2, num_blocks=20, policy="frugal")
    for start in (0, 100):
        cell.run(ListFront([request(start + i, 8, 24) for i in range(8)]))
        idle = ListFront([request(start + 50, 4, 8)])
        idle.inbox(0.0)
        cell.run(idle, until=lambda: sum(w._engine is None for w in cell.workers.values()) == 1)
    awake = [w for w, worker in cell.workers.items() if worker._engine is not None]
    assert cell.metrics.report(1.0)["wakes"]
    assert not cell.scheduler.registry.ledger.ordered[awake].any()


def test_a_stop_ends_the_worker():
    cell = hashing(1, num_blocks=4)
    cell.loop.stop()
    cell.workers[1].run_once()
    assert cell.workers[1].stopped


@pytest.fixture
def silent(monkeypatch):
    """Worker 1 with two requests, without periodic reports, and the other transports."""
    monkeypatch.setattr(worker_module, "REPORT_EVERY_S", 1e6)
    cell = hashing(2, num_blocks=60)
    rank0, worker = cell.network.transports[0], cell.workers[1]
    for request_id in (1, 2):
        rank0.send(1, Assign(request(request_id, 3, 50), request_id, ()))
    for _ in range(3):
        worker.run_once()
    rank0.poll()
    return worker, rank0, cell.network.transports[2]


def received(rank0, kind):
    return [message for _, message in rank0.poll() if isinstance(message, kind)]


def test_the_tokens_of_a_stopped_source_are_reported_at_once(silent):
    worker, rank0, _ = silent
    worker.run_once()
    assert received(rank0, StepReport) == []
    rank0.send(1, SendKv(1, 1, 2, 9, 0))
    worker.run_once()
    [report] = received(rank0, StepReport)
    assert 1 in report.request_ids


class EndsAtTheSecondRead(Transfer):
    """A transfer that another thread ends between two reads of `done`."""

    reads = 0

    @property
    def done(self):
        self.reads += 1
        return self.reads > 1

    @done.setter
    def done(self, value):
        pass


def test_a_transfer_that_ends_while_others_are_handled_is_not_lost(silent):
    worker, _, _ = silent
    ended, ends = Transfer(), EndsAtTheSecondRead()
    ended.end()
    handled = []
    worker._batch = SimpleNamespace(handle=lambda source, event: handled.append(event) or [])
    worker._transfers = [(ended, lambda _: "first"), (ends, lambda _: "second")]
    worker._finish_transfers()
    worker._finish_transfers()
    assert handled == ["first", "second"] and worker._transfers == []


def test_the_first_token_of_a_migrated_sequence_is_reported_at_once(silent):
    worker, rank0, source = silent
    rank0.send(1, ReceiveKv(request(7, 3, 50), 9, 2, 0, 3, 0, ()))
    worker.run_once()
    source.send(1, KvPayload(7, 9, "hash hash", 0, 0, 0, (), (), True, 9 * ROUNDS))
    worker.run_once()
    [report] = received(rank0, StepReport)
    assert 7 in report.request_ids
