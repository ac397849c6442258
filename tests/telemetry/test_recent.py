"""Figures of the last seconds: what is older than their span no longer counts."""

import pytest

from mellmpi import protocol as p
from mellmpi.telemetry import Metrics, Recent
from mellmpi.telemetry.recent import BIN_S, LATENCY_S, MOVES, NEWEST, RATE_S, STEPS_S, Latency, Sums
from tests.telemetry.test_metrics import ended, ready, started, state, submit


class Watched(Recent):
    """Takes single commands, so that the events of the tests of `Metrics` fit."""

    def command(self, now, destination, command):
        self.commands(now, [(destination, command)])


@pytest.fixture
def recent():
    return Watched()


def emit(r, now, n, request_id=1, finish=None):
    r.command(now, p.FRONT, p.Emit(request_id, 0, (7,) * n, (), finish, ()))


def report(r, now, worker, steps, step_s, num_tokens):
    runs = ((1,), (1,), (0,), (num_tokens,), (7,) * num_tokens, (), (), 0, (), ())
    r.observe(now, worker, p.StepReport(steps, step_s, 0, num_tokens, 0, 0, *runs))


def test_a_rate_covers_its_span_and_at_the_start_the_time_since_the_first_value():
    sums = Sums(10.0)
    assert sums.rates(5.0) == [0.0]
    for second in range(40):
        sums.add(100.0 + second, 7)
    assert sums.rates(139.99)[0] == pytest.approx(7.0, rel=0.11)
    assert sums.rates(200.0) == [0.0]
    early = Sums(10.0)
    early.add(50.0, 6)
    early.add(52.0, 6)
    assert early.rates(52.0) == [6.0]


def test_sums_that_nobody_reads_take_no_more_memory():
    sums = Sums(10.0)
    for second in range(10_000):
        sums.add(float(second), 1)
    assert len(sums._bins) <= 10.0 / BIN_S + 1


def test_a_latency_older_than_its_span_no_longer_counts_and_memory_is_bounded():
    latency = Latency()
    assert latency.percentiles_ms(0.0) == {"p50": None, "p99": None}
    latency.add(1.0, 9.0)
    latency.add(2.0, 0.25)
    assert latency.percentiles_ms(1.0 + LATENCY_S) == {"p50": 250.0, "p99": 250.0}
    for _ in range(3 * NEWEST):
        latency.add(3.0, 0.5)
    assert len(latency._samples) == NEWEST


def test_ttft_and_tpot_are_those_of_the_metrics(recent):
    metrics = Metrics()
    for r in (recent, metrics):
        submit(r, 1.0)
        emit(r, 1.25, 1)
        emit(r, 2.0, 3)
        emit(r, 2.25, 1, finish="length")
        submit(r, 2.0, request_id=2)
        emit(r, 2.5, 2, request_id=2)
        r.observe(2.75, p.FRONT, p.Cancel(2, "gone"))  # not completed: no TPOT
        submit(r, 3.0, request_id=3)
        emit(r, 3.1, 1, request_id=3)
        emit(r, 3.2, 2, request_id=3)
        r.observe(3.3, p.FRONT, p.Cancel(3, "stop"))  # a stop string was found: completed
    figures = metrics.report(4.0)
    assert recent.ttft.percentiles_ms(4.0) == figures["ttft_ms"]
    assert recent.tpot.percentiles_ms(4.0) == figures["tpot_ms"]
    totals = recent.totals(4.0)
    assert totals["output_tokens"] == figures["output_tokens"] == 10
    assert totals["requests"] == figures["requests"] == 3
    assert not recent._open


def test_device_seconds_are_those_of_the_metrics(recent):
    metrics = Metrics()
    for r in (recent, metrics):
        for worker in (1, 2, 3):
            ready(r, 0.0, worker)
        submit(r, 10.0)
        state(r, 12.0, 2, "parking")
        r.observe(13.0, 2, p.Parked(0))
        r.observe(15.0, 3, p.WorkerLost(3))
    figures, totals = metrics.report(20.0), recent.totals(20.0)
    assert totals["gpu_seconds"] == figures["gpu_seconds_active"] == 10 + 3 + 5
    assert totals["gpu_seconds_all_on"] == figures["gpu_seconds_total"] == 30


def test_without_a_request_no_device_seconds_are_counted(recent):
    ready(recent, 0.0, 1)
    assert recent.totals(50.0)["gpu_seconds"] == recent.totals(50.0)["gpu_seconds_all_on"] == 0


def test_a_worker_has_the_mean_step_and_the_token_rate_of_its_last_seconds(recent):
    assert recent.worker(1, 0.0) == (None, 0.0)
    report(recent, 0.0, 1, steps=50, step_s=50.0, num_tokens=900)
    start_s = 2 * STEPS_S
    for i in range(10):
        report(recent, start_s + i * STEPS_S / 10, 1, steps=2, step_s=0.06, num_tokens=10)
    step_ms, rate = recent.worker(1, start_s + STEPS_S - 0.01)
    assert step_ms == pytest.approx(30.0) and rate == pytest.approx(100 / STEPS_S)
    assert recent.worker(2, start_s) == (None, 0.0)


def test_requests_and_tokens_a_second(recent):
    for i in range(20):
        submit(recent, float(i), request_id=i)
        emit(recent, float(i), 3, request_id=i)
    rates = recent.rates(19.9)
    assert rates["requests_per_s"] == pytest.approx(1.0, rel=1 / RATE_S)
    assert rates["output_tokens_per_s"] == pytest.approx(3.0, rel=1 / RATE_S)


def test_a_migration_is_kept_with_its_prediction_once_it_has_ended(recent):
    submit(recent, 0.0)
    started(recent, 1.0, "transfer", 1, 2)
    assert not recent.moves
    ended(recent, 1.5, "transfer", 1, 2)
    started(recent, 2.0, "split", 2, 1)
    ended(recent, 2.25, "split", 2, 1, outcome="refused")
    first, second = recent.moves
    assert (first.ended_s, first.seconds) == (1.5, 0.5) and first.started.predicted_s == 1.0
    assert second.ended.outcome == "refused"
    assert recent.totals(3.0)["migrations"] == 1
    for i in range(2 * MOVES):
        started(recent, 3.0 + i, "transfer", 1, 2)
        ended(recent, 3.5 + i, "transfer", 1, 2)
    assert len(recent.moves) == MOVES and recent.moves[-1].ended_s == 3.5 + 2 * MOVES - 1


def test_nothing_is_kept_of_a_request_that_ended_during_its_migration(recent):
    submit(recent, 0.0)
    started(recent, 1.0, "transfer", 1, 2)
    emit(recent, 1.1, 1, finish="stop")
    recent.command(1.2, p.FRONT, p.Rejected(2, "no", 0.0))
    assert not recent._migrating and not recent._open


def test_a_request_id_may_come_again(recent):
    for start_s in (0.0, 10.0):
        submit(recent, start_s)
        emit(recent, start_s + 0.5, 1, finish="stop")
    assert recent.ttft.percentiles_ms(11.0)["p99"] == 500.0
