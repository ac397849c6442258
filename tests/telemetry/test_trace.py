"""The trace: valid JSON in which everything that begins ends, and which shows what happened."""

import json
from collections import defaultdict
from itertools import pairwise

import pytest

from mellmpi import protocol as p
from mellmpi.telemetry import Metrics, Observers, Trace
from mellmpi.telemetry.trace import ARROWS, FLUSH_AT, STEPS
from tests.telemetry.observed import observed

GREEDY = p.GREEDY
REQUEST = p.Request(7, "m", (1, 2, 3), GREEDY, None, 0, None)


class Written:
    """A trace, and the parts of its file so far."""

    def __init__(self):
        self.parts = []
        self.trace = Trace(self.parts.append)

    def close(self, now):
        self.trace.close(now)
        return json.loads(b"".join(self.parts))


def of(events, phase, **fields):
    return [e for e in events if e["ph"] == phase and fields.items() <= e.items()]


def report(now, w, steps=1, step_s=0.1, free=0):
    return now, w, p.StepReport(steps, step_s, 5, 2, free, 0, *((),) * 7, 0, (), ())


def ready(now, worker):
    kv = p.ModelKv("m", 16, 64)
    return now, worker, p.WorkerReady((kv,), 1000, 8, 0, 0.0, 64, None, (), "")


def started(src=1, dst=2):
    return p.MigrationStarted(7, "transfer", src, dst, "drain", 0, 640, 0.2, 0.05)


def ended(outcome="moved"):
    return p.MigrationEnded(7, "transfer", 1, 2, 640, 0.1, outcome)


def moved_once(outcome="moved"):
    """A request runs on worker 1 and tries to move to worker 2."""
    run = Written()
    trace = run.trace
    for worker in (1, 2):
        trace.observe(*ready(10.0, worker))
    trace.observe(11.0, p.FRONT, p.Submit(REQUEST))
    trace.commands(11.5, [(1, p.Assign(REQUEST, 1, ()))])
    trace.observe(*report(12.0, 1))
    trace.commands(12.0, [(p.FRONT, p.Emit(7, 0, (5, 5), (), None, ()))])
    trace.commands(12.5, [(p.OBSERVER, started())])
    trace.commands(13.0, [(p.OBSERVER, ended(outcome))])
    trace.commands(14.0, [(p.FRONT, p.Emit(7, 2, (5,), (), "stop", ()))])
    return run.close(15.0)


def slices(events, category):
    """(process, name, begin, end) of each slice; times in seconds."""
    found, begun = [], {}
    for e in events:
        if e.get("cat") == category and e["ph"] in "be":
            key = e["pid"], e["id2"]["local"]
            if e["ph"] == "b":
                assert key not in begun
                begun[key] = e
            else:
                begin = begun.pop(key)
                times = (round(x["ts"] / 1e6, 6) for x in (begin, e))
                found.append((e["pid"], e["name"], *times))
    assert not begun
    return found


def test_a_request_is_shown_where_it_is():
    events = moved_once()
    assert slices(events, "request") == [(0, "request 7", 1.0, 4.0)]
    assert slices(events, "place") == [
        (0, "queued", 1.0, 1.5),
        (1, "request 7", 1.5, 3.0),
        (2, "request 7", 3.0, 4.0),
    ]
    [first] = of(events, "n")
    assert (first["name"], first["ts"]) == ("first token", 2e6)
    assert of(events, "e", cat="request")[0]["args"] == {"finish_reason": "stop", "tokens": 3}


def test_a_migration_is_shown_on_both_workers_with_an_arrow():
    events = moved_once()
    name = "transfer 1 → 2, request 7"
    assert slices(events, "migration") == [(1, name, 2.5, 3.0), (2, name, 2.5, 3.0)]
    [start], [end] = of(events, "s"), of(events, "f")
    assert (start["pid"], start["ts"], end["pid"], end["ts"]) == (1, 2.5e6, 2, 3e6)
    for arrow in (start, end):
        [bound] = of(events, "X", pid=arrow["pid"], tid=ARROWS)
        assert bound["ts"] <= arrow["ts"] <= bound["ts"] + bound["dur"]
    begun = of(events, "b", cat="migration")[0]["args"]
    assert begun["reason"] == "drain" and begun["predicted_s"] == 0.2
    assert of(events, "e", cat="migration")[0]["args"]["outcome"] == "moved"


def test_a_migration_that_failed_has_no_arrow_and_the_request_stays():
    events = moved_once("refused")
    assert not of(events, "s") and not of(events, "f")
    assert slices(events, "place")[-1][:2] == (1, "request 7")


def test_steps_of_a_worker_do_not_overlap_though_a_report_is_late():
    run = Written()
    run.trace.observe(*ready(0.0, 1))
    run.trace.observe(*report(1.0, 1, steps=3, step_s=0.5))
    run.trace.observe(*report(1.2, 1, steps=2, step_s=0.4))
    run.trace.observe(*report(1.3, 1, steps=0, step_s=0.0))
    first, second = of(run.close(2.0), "X", pid=1, tid=STEPS)
    assert (first["ts"], first["dur"], first["name"]) == (0.5e6, 0.5e6, "3 steps")
    assert (second["ts"], second["dur"]) == (1e6, 0.2e6)
    assert second["args"] == {"prefill_tokens": 5, "decode_tokens": 2}


def test_kv_in_use_is_written_when_it_changes():
    run = Written()
    run.trace.observe(*ready(0.0, 1))
    for now, free in ((1.0, 400), (2.0, 400), (3.0, 1000)):
        run.trace.observe(*report(now, 1, free=free))
    used = [(e["ts"] / 1e6, e["args"]["used"]) for e in of(run.close(4.0), "C")]
    assert used == [(0, 0), (1, 600), (3, 0)]


def test_the_requests_of_a_lost_worker_are_in_the_queue():
    run = Written()
    run.trace.observe(*ready(0.0, 1))
    run.trace.commands(0.0, [(p.OBSERVER, p.WorkerChanged(1, "active"))])
    run.trace.observe(0.0, p.FRONT, p.Submit(REQUEST))
    run.trace.commands(0.0, [(1, p.Assign(REQUEST, 1, ()))])
    run.trace.observe(1.0, 1, p.WorkerLost(1))
    run.trace.commands(1.0, [(p.OBSERVER, p.WorkerChanged(1, "lost"))])
    events = run.close(2.0)
    assert slices(events, "place")[-1] == (0, "queued", 1.0, 2.0)
    assert slices(events, "state") == [(1, "active", 0.0, 1.0), (1, "lost", 1.0, 2.0)]


def test_text_of_clients_stays_text():
    run = Written()
    odd = p.Request(1, 'm"\n\ud800', (1,), GREEDY, None, 0, None)
    run.trace.observe(0.0, p.FRONT, p.Submit(odd))
    assert of(run.close(1.0), "b", cat="request")[0]["args"]["model"] == odd.model


def test_an_unfinished_file_lacks_only_its_end():
    run = Written()
    for i in range(20_000):
        run.trace.observe(*report(float(i), 1, free=i))
        assert sum(map(len, run.trace._text)) < 2 * FLUSH_AT
    assert len(run.parts) > 5
    text = b"".join(run.parts).decode()
    assert len(json.loads(text[: text.rindex(",\n")] + "]")) > 10_000


@pytest.mark.parametrize("seed", range(40))
def test_everything_that_begins_ends(seed):
    run = Written()
    sim = observed(seed, run.trace)
    assert not run.trace._owner and not run.trace._moves and not run.trace._silent
    assert {category for _, category, _ in run.trace._open} <= {"state"}
    events = run.close(sim.now)
    requests = slices(events, "request")
    assert len(requests) == sim.metrics.report(sim.now)["requests"]
    places = defaultdict(list)
    for e in events:
        if e.get("cat") == "place" and e["ph"] in "be":
            places[e["id2"]["local"]].append(e["ts"])
    assert all(times == sorted(times) for times in places.values())
    for _, name, begin, end in requests:  # each request is somewhere at any time
        times = places[name.removeprefix("request ")]
        assert (times[0] / 1e6, times[-1] / 1e6) == pytest.approx((begin, end), abs=1e-6)
        assert times[1:-1:2] == times[2:-1:2]
    moves = [m for m in sim.outcome.observed if isinstance(m[1], p.MigrationEnded)]
    assert len(slices(events, "migration")) == 2 * len(moves)
    moved = sum(m.outcome == "moved" for _, m in moves)
    assert len(of(events, "s")) == len(of(events, "f")) == moved
    for worker in sim.workers:
        steps = of(events, "X", pid=worker, tid=STEPS)
        for a, b in pairwise(steps):
            assert a["ts"] + a["dur"] <= b["ts"] + 0.2


def test_several_observers_see_the_same():
    alone, first, second = Metrics(), Metrics(), Metrics()
    both = Observers(first, second)
    for m in (alone, both):
        m.observe(*ready(0.0, 1))
        m.observe(1.0, p.FRONT, p.Submit(REQUEST))
        m.commands(2.0, [(p.FRONT, p.Emit(7, 0, (5,), (), "stop", ()))])
    assert alone.report(3.0) == first.report(3.0) == second.report(3.0)
