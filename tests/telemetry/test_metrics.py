"""Metrics: one hand-made history per rule; all durations of a history differ."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from mellmpi import protocol as p
from mellmpi.costs import CostModel
from mellmpi.telemetry import Metrics, series
from mellmpi.telemetry.series import EXACT_SAMPLES, Distribution, Sample, StepFunction

NO_RUNS = ((), (), (), (), (), (), (), 0, (), ())  # nothing attended, cached, scored
GREEDY = replace(p.GREEDY, max_tokens=9)


def submit(m, now, request_id=1, num_prompt=5):
    prompt = tuple(range(num_prompt))
    m.observe(now, p.FRONT, p.Submit(p.Request(request_id, "m", prompt, GREEDY, None, 0, None)))


def emit(m, now, n, request_id=1, finish=None):
    m.command(now, p.FRONT, p.Emit(request_id, 0, (7,) * n, (), finish, ()))


def report(m, now, worker, free_bytes=0):
    m.observe(now, worker, p.StepReport(1, 0.01, 0, 1, free_bytes, 0, *NO_RUNS))


def tokens(m, now, worker, n=1, request_id=1, finish=None):
    """`worker` reports n tokens and the scheduler emits them."""
    report(m, now, worker)
    emit(m, now, n, request_id, finish)


def arrived(m, now, worker, n, request_id=1):
    """`worker` has received the KV, with n tokens that the source had not reported."""
    m.observe(now, worker, p.KvReceived(request_id, 2, 0, (7,) * n, (), 640, 0.1))
    if n:
        emit(m, now, n, request_id)


def ready(m, now, worker, capacity=1000):
    kv = p.ModelKv("m", 16, 64)
    m.observe(now, worker, p.WorkerReady((kv,), capacity, 8, 0, 0.0, 64, None, (), ""))


def state(m, now, worker, name):
    m.command(now, p.OBSERVER, p.WorkerChanged(worker, name))


def started(m, now, mode, src, dst, request_id=1):
    m.command(
        now, p.OBSERVER, p.MigrationStarted(request_id, mode, src, dst, "drain", 0, 640, 1.0, 0.0)
    )


def ended(m, now, mode, src, dst, outcome="moved", num_bytes=640, request_id=1):
    m.command(
        now, p.OBSERVER, p.MigrationEnded(request_id, mode, src, dst, num_bytes, 0.1, outcome)
    )


# --- requests ---


def test_ttft_runs_from_submit_to_the_first_tokens():
    m = Metrics()
    submit(m, 10.0)
    emit(m, 10.1, 0)
    emit(m, 10.25, 2)
    assert m.report(11.0)["ttft_ms"] == {"p50": 250.0, "p99": 250.0}


def test_tpot_leaves_the_first_token_out_and_needs_a_second():
    m = Metrics()
    submit(m, 0.0, request_id=1)
    submit(m, 0.0, request_id=2)
    emit(m, 3.0, 1, request_id=2, finish="stop")
    emit(m, 1.0, 1)
    emit(m, 1.5, 3)
    emit(m, 2.0, 1, finish="length")
    r = m.report(4.0)
    assert r["tpot_ms"] == {"p50": 250.0, "p99": 250.0}
    assert r["e2e_ms"]["p50"] == 2500.0


def test_an_unfinished_request_has_a_ttft_but_no_tpot():
    m = Metrics()
    submit(m, 0.0)
    emit(m, 1.0, 1)
    emit(m, 2.0, 1)
    r = m.report(3.0)
    assert r["ttft_ms"]["p50"] == 1000.0 and r["tpot_ms"]["p50"] is None
    assert (r["requests"], r["completed"], r["output_tokens"]) == (1, 0, 2)


def test_tokens_of_one_emit_make_one_gap():
    m = Metrics()
    submit(m, 0.0)
    for now, n in ((1.0, 4), (1.1, 1), (1.3, 8)):
        emit(m, now, n)
    assert m.report(2.0)["itl_ms"]["p50"] == pytest.approx(150.0)


def test_every_request_ends_completed_failed_or_cancelled():
    m = Metrics()
    for i in range(4):
        submit(m, 0.0, request_id=i, num_prompt=10)
    emit(m, 1.0, 1, request_id=0, finish="stop")
    m.command(1.0, p.FRONT, p.Rejected(1, "too long", 0.0))
    m.observe(1.0, p.FRONT, p.Cancel(2, "gone"))
    m.observe(1.0, p.FRONT, p.Cancel(2, "gone"))
    m.observe(1.0, p.FRONT, p.Cancel(0, "gone"))
    r = m.report(2.0)
    assert (r["requests"], r["completed"], r["failed"], r["cancelled"]) == (4, 1, 1, 1)
    assert r["prompt_tokens"] == 30


def test_a_request_refused_by_the_frontend_counts_as_failed():
    m = Metrics()
    m.command(0.0, p.FRONT, p.Rejected(1, "unknown model", 0.0))
    r = m.report(1.0)
    assert (r["requests"], r["failed"], r["prompt_tokens"]) == (1, 1, 0)


def test_throughput_counts_from_the_first_submit():
    m = Metrics()
    ready(m, 0.0, 1)
    submit(m, 10.0)
    emit(m, 12.0, 30, finish="length")
    r = m.report(14.0)
    assert (r["wall_s"], r["output_throughput"]) == (4.0, 7.5)


def test_a_report_of_nothing_is_complete_and_serialisable():
    r = json.loads(json.dumps(Metrics().report(5.0)))
    assert set(r) >= {
        "requests",
        "completed",
        "failed",
        "wall_s",
        "prompt_tokens",
        "output_tokens",
        "output_throughput",
        "gpu_seconds_active",
        "gpu_seconds_total",
        "active_workers_mean",
        "active_workers_peak",
        "migrations",
        "migrated_bytes",
        "downtime_ms",
        "ttft_ms",
        "tpot_ms",
        "workers_lost",
        "preemptions",
        "parks",
        "wakes",
        "itl_ms",
    }
    assert r["migrations"] == {"transfer": 0, "recompute": 0, "split": 0, "failed": 0}
    assert r["wall_s"] == 0 and r["ttft_ms"] == {"p50": None, "p99": None}


def test_other_messages_change_no_figure():
    m = Metrics()
    m.observe(0.0, 1, p.KvReserved(1, 2, 0))
    m.command(0.0, 1, p.Release(1, 2))
    assert m.report(1.0) == Metrics().report(1.0)


# --- workers ---


def test_a_parked_or_lost_worker_costs_no_gpu_seconds():
    m = Metrics()
    for worker in (1, 2, 3):
        ready(m, 0.0, worker)
    submit(m, 10.0)
    state(m, 11.0, 2, "draining")
    state(m, 12.0, 2, "parking")
    m.observe(13.0, 2, p.Parked(0))
    m.observe(15.0, p.SCHEDULER, p.WorkerLost(3))
    r = m.report(20.0)
    assert r["gpu_seconds_active"] == 10 + 3 + 5 and r["gpu_seconds_total"] == 30
    assert (r["active_workers_mean"], r["active_workers_peak"]) == (1.8, 3)
    assert (r["parks"], r["wakes"], r["workers_lost"]) == (1, 0, 1)


def test_a_waking_worker_counts_as_active_from_its_first_second():
    m = Metrics()
    ready(m, 0.0, 1)
    submit(m, 0.0)
    m.observe(2.0, 1, p.Parked(0))
    m.command(5.0, 1, p.Wake())
    state(m, 5.0, 1, "waking")
    ready(m, 6.0, 1)
    r = m.report(10.0)
    assert r["gpu_seconds_active"] == 7 and (r["parks"], r["wakes"]) == (1, 1)


def test_an_event_and_its_announcement_count_once():
    m = Metrics()
    ready(m, 0.0, 1)
    state(m, 0.0, 1, "active")
    submit(m, 0.0)
    m.observe(1.0, p.SCHEDULER, p.WorkerLost(1))
    state(m, 1.0, 1, "lost")
    m.observe(2.0, 1, p.Parked(0))
    r = m.report(4.0)
    assert (r["workers_lost"], r["parks"], r["gpu_seconds_active"]) == (1, 0, 1)


def test_the_peak_counts_from_the_first_request():
    m = Metrics()
    ready(m, 0.0, 1)
    ready(m, 0.0, 2)
    m.observe(1.0, 2, p.Parked(0))
    submit(m, 2.0)
    r = m.report(3.0)
    assert (r["active_workers_peak"], r["gpu_seconds_active"]) == (1, 1)


# --- migrations ---


def decoding():
    """Request 1 is submitted at 0 s; worker 1 reports its first token at 1 s."""
    m = Metrics()
    submit(m, 0.0)
    tokens(m, 1.0, worker=1)
    return m


def transferred(m, start_s, end_s, src, dst):
    """Request 1 moves; the source had reported all its tokens."""
    started(m, start_s, "transfer", src, dst)
    arrived(m, end_s, worker=dst, n=0)
    ended(m, end_s, "transfer", src, dst)


def test_downtime_runs_from_the_sources_last_report_to_the_destinations_first_token():
    m = decoding()
    started(m, 1.1, "transfer", 1, 2)
    tokens(m, 1.2, worker=1)
    arrived(m, 1.3, worker=2, n=1)
    ended(m, 1.3, "transfer", 1, 2)
    tokens(m, 1.45, worker=2)
    tokens(m, 1.9, worker=2)
    r = m.report(2.0)
    assert r["downtime_ms"] == {"p50": 250.0, "p99": 250.0}
    assert r["migrations"] == {"transfer": 1, "recompute": 0, "split": 0, "failed": 0}
    assert r["migrated_bytes"] == 640


@pytest.mark.parametrize("ended_before_first_token", [True, False])
def test_a_recompute_has_a_downtime_whenever_it_is_announced_as_ended(ended_before_first_token):
    m = decoding()
    started(m, 1.1, "recompute", 1, 2)
    if ended_before_first_token:
        ended(m, 1.1, "recompute", 1, 2, num_bytes=0)
    tokens(m, 1.5, worker=2)
    if not ended_before_first_token:
        ended(m, 1.5, "recompute", 1, 2, num_bytes=0)
    tokens(m, 1.6, worker=2)
    assert m.report(2.0)["downtime_ms"] == {"p50": 500.0, "p99": 500.0}


def test_two_moves_without_a_token_between_them_are_one_downtime():
    m = decoding()
    for src, dst in ((1, 2), (2, 1)):
        transferred(m, 1.1, 1.2, src, dst)
    tokens(m, 1.7, worker=1)
    tokens(m, 2.7, worker=1)
    assert m.report(3.0)["downtime_ms"] == {"p50": 700.0, "p99": 700.0}


def test_a_move_before_the_first_token_has_no_downtime():
    m = Metrics()
    submit(m, 0.0)
    transferred(m, 1.0, 1.2, 1, 2)
    tokens(m, 1.5, worker=2)
    assert m.report(2.0)["downtime_ms"]["p50"] is None


def test_an_unsuccessful_move_counts_as_failed_and_has_no_downtime():
    m = decoding()
    started(m, 1.1, "transfer", 1, 2)
    ended(m, 1.2, "transfer", 1, 2, outcome="refused", num_bytes=0)
    tokens(m, 1.3, worker=1)
    tokens(m, 1.4, worker=2)
    r = m.report(2.0)
    assert r["downtime_ms"]["p50"] is None and r["migrations"]["failed"] == 1
    assert r["migrations"]["transfer"] == 0 and r["migration_outcomes"] == {"refused": 1}


def test_a_refused_second_move_does_not_hide_the_first_ones_downtime():
    m = decoding()
    transferred(m, 1.1, 1.2, 1, 2)
    started(m, 1.3, "transfer", 2, 3)
    ended(m, 1.3, "transfer", 2, 3, outcome="refused", num_bytes=0)
    tokens(m, 1.6, worker=2)
    assert m.report(2.0)["downtime_ms"]["p50"] == 600.0


def test_the_wait_of_a_preempted_request_is_no_downtime():
    m = decoding()
    transferred(m, 1.1, 1.2, 1, 2)
    m.command(1.3, p.OBSERVER, p.Preempted(1, 2))
    tokens(m, 9.0, worker=1)
    r = m.report(10.0)
    assert r["downtime_ms"]["p50"] is None and r["preemptions"] == 1


def test_a_destination_lost_before_its_first_token_is_a_recovery_and_no_downtime():
    m = decoding()
    transferred(m, 1.1, 1.2, 1, 2)
    m.observe(1.3, p.SCHEDULER, p.WorkerLost(2))
    tokens(m, 9.0, worker=1)
    assert m.report(10.0)["downtime_ms"]["p50"] is None


# --- series ---


def test_the_series_count_time_from_the_first_submit():
    m = Metrics()
    ready(m, 100.0, 1, capacity=1000)
    ready(m, 100.0, 2, capacity=1000)
    submit(m, 102.0)
    report(m, 103.0, 1, free_bytes=400)
    started(m, 104.0, "transfer", 1, 2)
    ended(m, 105.0, "transfer", 1, 2)
    m.command(106.0, p.OBSERVER, p.Preempted(1, 2))
    m.observe(107.0, 1, p.Parked(0))
    s = m.series(110.0)
    w = s.workers[1]
    assert (w.kv_times_s, w.kv_bytes) == ([-2.0, 1.0, 5.0], [0, 600, 0])
    assert (w.state_times_s, w.states) == ([-2.0, 5.0], ["active", "parked"])
    assert w.capacity_bytes == 1000 and s.end_s == 8.0 and s.preemptions == [(4.0, 2)]
    move = s.moves[0]
    assert (move.start_s, move.end_s, move.src, move.dst, move.num_bytes) == (2.0, 3.0, 1, 2, 640)


def test_a_long_run_keeps_bounded_series_and_the_right_value_at_the_end():
    steps = StepFunction(limit=100)
    for i in range(100_000):
        steps.add(i / 100, i)
    assert 40 <= len(steps.times) <= 100 and steps.values[-1] == 99_999
    assert np.all(np.diff(steps.times) > 0)


def test_a_step_function_keeps_the_last_value_of_one_time():
    steps = StepFunction(limit=10)
    for i in range(50):
        steps.add(1.0, i)
    assert (list(steps.times), steps.values) == ([1.0], [49])


def test_a_sample_over_its_limit_stays_spread_over_the_whole_run():
    sample = Sample(limit=100)
    for i in range(10_000):
        sample.add(i)
    assert 50 <= len(sample.items) <= 100
    assert (
        sample.items[0] == 0 and sample.items[-1] > 9_700 and len(set(np.diff(sample.items))) == 1
    )


def test_percentiles_stay_within_a_percent_when_samples_no_longer_fit():
    values = np.random.default_rng(0).lognormal(-4, 1, 3 * EXACT_SAMPLES + 5)
    d = Distribution()
    for v in values:
        d.add(float(v))
    for name, q in (("p50", 50), ("p99", 99)):
        assert d.percentiles_ms()[name] == pytest.approx(1e3 * np.percentile(values, q), rel=0.01)


def test_a_gap_of_zero_is_a_sample_too():
    d = Distribution()
    for _ in range(EXACT_SAMPLES + 1):
        d.add(0.0)
    assert d.percentiles_ms()["p99"] < 0.01


def test_an_answer_that_a_stop_string_ends_is_completed_not_cancelled():
    m = Metrics()
    submit(m, 0.0)
    m.observe(1.0, p.FRONT, p.Cancel(1, "stop"))
    report = m.report(2.0)
    assert (report["completed"], report["cancelled"]) == (1, 0)


def test_a_cost_model_fitted_to_the_report_is_the_true_one():
    m, truth = Metrics(), CostModel(2e-5, 4e-3, 1e-3, 1e8, 5e-3, 1.5)
    ready(m, 0.0, 1)
    for i, (steps, prefill, decode) in enumerate([(1, 64, 0), (4, 0, 9), (5, 30, 5), (2, 7, 14)]):
        took_s = steps * truth.step_s + truth.forward_s(prefill, decode) - truth.step_s
        m.observe(i, 1, p.StepReport(steps, took_s, prefill, decode, 0, 0, *NO_RUNS))
    for num_bytes in (10_000, 400_000):
        took_s = truth.transfer_s(num_bytes)
        m.command(
            4.0, p.OBSERVER, p.MigrationEnded(1, "transfer", 1, 2, num_bytes, took_s, "moved")
        )
    m.command(5.0, 1, p.Wake())
    kv = p.ModelKv("m", 16, 64)
    m.observe(6.5, 1, p.WorkerReady((kv,), 1000, 8, 0, 1.5, 64, None, (), ""))
    report = json.loads(json.dumps(m.report(7.0)))
    assert asdict(CostModel.fitted(report["costs"])) == pytest.approx(asdict(truth))
    blocks = {"m": {"block_size": 16, "block_bytes": 64}}
    assert report["worker_kv"] == {"capacity_bytes": 1000, "models": blocks}


def test_the_report_has_the_block_sizes_of_every_model():
    m = Metrics()
    first, second, third = (p.ModelKv(name, n, 64) for name, n in (("a", 4), ("b", 8), ("c", 16)))
    m.observe(0.0, 1, p.WorkerReady((first, second), 640, 8, 0, 0.0, 64, None, (), ""))
    m.observe(0.0, 2, p.WorkerReady((second, third), 512, 8, 0, 0.0, 64, None, (), ""))
    kv = m.report(1.0)["worker_kv"]
    sizes = {name: model["block_size"] for name, model in kv["models"].items()}
    assert (kv["capacity_bytes"], sizes) == (640, {"a": 4, "b": 8, "c": 16})


def test_costs_do_not_depend_on_how_many_samples_are_summed_at_once(monkeypatch):
    def summed(at_once):
        monkeypatch.setattr(series, "FOLD_EVERY", at_once)
        sums = series.NormalEquations("a", "b")
        for i in range(10):
            sums.add((1, i), 3 + 2 * i, weight=1 / (1 + i % 3))
        return sums.to_dict()

    one, four, all_of_them = summed(1), summed(4), summed(99)
    assert one["samples"] == four["samples"] == all_of_them["samples"] == 10
    for name in ("xx", "xy"):
        assert np.allclose(one[name], four[name]) and np.allclose(one[name], all_of_them[name])


def test_commands_in_one_call_count_as_in_calls_of_their_own():
    together, apart = Metrics(), Metrics()
    for m in (together, apart):
        ready(m, 0.0, 1)
        submit(m, 1.0, request_id=1)
        submit(m, 1.5, request_id=2)
        report(m, 2.0, 1)
    emits = [p.Emit(1, 0, (7, 7), (), None, ()), p.Emit(2, 0, (7,), (), "length", ())]
    commands = [(p.FRONT, emits[0]), (p.OBSERVER, p.Preempted(1, 1)), (p.FRONT, emits[1])]
    together.commands(2.0, commands)
    for destination, command in commands:
        apart.command(2.0, destination, command)
    assert together.report(3.0) == apart.report(3.0) and apart.report(3.0)["output_tokens"] == 3


def test_the_prediction_error_is_the_median_relative_to_the_actual_time():
    m = Metrics()
    assert m.report(0.0)["migration_prediction_error"] is None
    for i, took_s in enumerate([0.5, 1.0, 2.0]):  # all were to take one second
        started(m, 10.0 * i, "split", 1, 2, request_id=i)
        ended(m, 10.0 * i + took_s, "split", 1, 2, request_id=i)
    started(m, 40.0, "split", 1, 2)
    ended(m, 90.0, "split", 1, 2, outcome="failed")
    report = m.report(100.0)
    assert report["migration_prediction_error"] == pytest.approx(0.5)
    assert report["migrations"]["split"] == 3


def test_the_report_compares_predicted_and_actual_figures_of_moves():
    m = Metrics()
    assert m.report(0.0)["migration_predictions"] == {}
    submit(m, 0.0)
    tokens(m, 1.0, 1)
    started(m, 1.1, "transfer", 1, 2)
    ended(m, 1.6, "transfer", 1, 2, num_bytes=320)
    tokens(m, 1.7, 2)
    found = m.report(2.0)["migration_predictions"]["transfer"]
    assert found["seconds"] == pytest.approx({"predicted": 1.0, "actual": 0.5, "error": 1.0})
    assert found["bytes"] == pytest.approx({"predicted": 640, "actual": 320, "error": 1.0})
    assert found["downtime_s"] == pytest.approx({"predicted": 0.0, "actual": 0.7, "error": 1.0})


def test_a_move_without_bytes_has_no_error_of_bytes():
    m = Metrics()
    started(m, 1.0, "recompute", 1, 2)
    ended(m, 2.0, "recompute", 1, 2, num_bytes=0)
    assert m.report(3.0)["migration_predictions"]["recompute"]["bytes"]["error"] is None
