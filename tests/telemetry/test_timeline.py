"""The timeline shows the run: the tests read the figure's marks, not its pixels."""

import matplotlib.image
import numpy as np
import pytest

from mellmpi.telemetry import Metrics
from mellmpi.telemetry.pictures import draw
from mellmpi.telemetry.pictures.figure import figure
from mellmpi.telemetry.pictures.lanes import LANE
from mellmpi.telemetry.pictures.style import MODES
from mellmpi.telemetry.series import MoveRecord, Series, WorkerSeries

MIB = 2**20


def worker(states=((0.0, "active"),), kv=((0.0, 0), (1.0, 60 * MIB)), capacity=64 * MIB):
    times, used = zip(*kv, strict=True) if kv else ((), ())
    starts, names = zip(*states, strict=True)
    return WorkerSeries(capacity, list(times), list(used), list(starts), list(names))


def series(workers=None, moves=(), preemptions=(), end_s=10.0, **report):
    workers = {1: worker(), 2: worker()} if workers is None else workers
    return Series(end_s, workers, list(moves), list(preemptions), Metrics().report(0.0) | report)


def move(mode="transfer", src=1, dst=2, outcome="moved", start_s=1.0):
    return MoveRecord(7, mode, src, dst, start_s, start_s + 0.5, 640, outcome)


def lanes(s):
    return figure(s).axes[1]


def texts(axes):
    return [t.get_text() for t in axes.texts]


def marks(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


def legend(s):
    return [t.get_text() for t in figure(s).legends[0].get_texts()]


def test_the_picture_is_written_where_asked(tmp_path):
    (tmp_path / "timeline.png").write_bytes(draw(series(moves=[move()]), ".PNG"))
    image = matplotlib.image.imread(tmp_path / "timeline.png")
    assert image.shape[1] == 1800 and np.ptp(image) > 0.5


@pytest.mark.parametrize("num_workers", [0, 1, 2, 8, 64])
def test_any_number_of_workers_fits_on_a_page(num_workers):
    fig = figure(series(workers={w: worker() for w in range(1, num_workers + 1)}))
    assert fig.get_figheight() < 15


def test_a_run_without_requests_has_an_empty_picture(tmp_path):
    assert draw(Metrics().series(5.0), ".png").startswith(b"\x89PNG")


def test_the_title_says_requests_wall_time_and_gpu_seconds():
    s = series(requests=48, wall_s=23.4, gpu_seconds_active=35.0, gpu_seconds_total=46.8)
    title = figure(s).axes[0].get_title(loc="left")
    assert title == "48 requests in 23.4 s  ·  35 of 47 GPU-seconds (75%)"


def test_an_arrow_leads_from_the_source_lane_to_the_destination_lane():
    axes = lanes(series(moves=[move(src=1, dst=2)]))
    segment = axes.collections[-1].get_segments()[0]
    np.testing.assert_allclose(segment, [[1.0, 1 + LANE / 2], [1.5, 0 + LANE / 2]])
    assert len(marks(axes, "v")) == 1 and not marks(axes, "^")
    assert len(marks(lanes(series(moves=[move(src=2, dst=1)])), "^")) == 1


def test_transfer_and_recompute_differ_in_colour_and_in_line_style():
    looks = list(MODES.values())
    assert len({c for c, _ in looks}) == len({s for _, s in looks}) == len(looks) == 3
    axes = lanes(series(moves=[move("transfer"), move("recompute")]))
    assert {line.get_color() for line in marks(axes, "v")} == {
        MODES["transfer"][0],
        MODES["recompute"][0],
    }


def test_only_migrations_that_happened_are_drawn():
    axes = lanes(series(moves=[move(outcome="refused"), move(dst=9)]))
    assert not marks(axes, "v") and not marks(axes, "^")


def test_a_recompute_that_ends_where_it_began_is_no_arrow():
    axes = lanes(series(moves=[move("recompute", src=1, dst=1)]))
    assert not marks(axes, "v") and not marks(axes, "^")


def test_a_parked_span_has_a_label_unless_it_is_short():
    parked = ((0.0, "active"), (4.0, "parked"))
    assert texts(lanes(series({1: worker(parked)}))) == ["parked"]
    brief = ((0.0, "active"), (4.0, "parked"), (4.1, "waking"), (4.2, "active"))
    axes = lanes(series({1: worker(brief)}))
    assert texts(axes) == [] and any(c.get_hatch() == "////" for c in axes.collections)


def test_a_lost_worker_has_a_cross_at_the_moment_it_was_lost():
    (cross,) = marks(lanes(series({1: worker(((0.0, "active"), (4.0, "lost")))})), "X")
    assert cross.get_xdata()[0] == 4.0


def test_preemptions_are_ticks_in_the_lane_of_their_worker():
    axes = lanes(series(preemptions=[(3.0, 2)]))
    (ticks,) = [c for c in axes.collections if c.get_label() == "preemption"]
    (x, low), (_, high) = ticks.get_segments()[0]
    assert x == 3.0 and low < 0 < high < LANE


def test_the_strip_counts_workers_that_hold_a_device():
    workers = {
        1: worker(((-2.0, "active"),)),
        2: worker(((-2.0, "active"), (3.0, "draining"), (4.0, "parked"), (6.0, "waking"))),
        3: worker(((-2.0, "active"), (8.0, "lost"))),
    }
    strip = figure(series(workers)).axes[0].lines[0]
    at = {t: n for t, n in zip(*strip.get_data(), strict=True)}
    assert [at[t] for t in (0.0, 3.0, 4.0, 6.0, 8.0, 10.0)] == [3, 3, 2, 3, 2, 2]


def test_the_legend_names_what_the_picture_contains_and_nothing_else():
    assert legend(series()) == ["KV in use (lane height 64 MiB)"]
    parked = ((0.0, "active"), (2.0, "draining"), (4.0, "parked"))
    assert legend(series({1: worker(), 2: worker(parked)}, [move()], [(1.0, 1)]))[1:] == [
        "transfer",
        "draining, parking or waking",
        "parked",
        "preemption",
    ]


def test_lanes_are_magnified_where_little_of_the_arena_is_used():
    little = {1: worker(kv=((0.0, 3 * MIB),))}
    assert legend(series(little)) == ["KV in use (lane height 4 MiB)"]


@pytest.mark.parametrize(("end_s", "unit"), [(23, "s"), (900, "min"), (20_000, "h")])
def test_the_time_axis_has_the_unit_that_fits(end_s, unit):
    axes = lanes(series(end_s=float(end_s)))
    assert axes.get_xlabel().endswith(f", {unit}")
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert 4 <= len(labels) <= 14 and max(len(x) for x in labels) <= 3
