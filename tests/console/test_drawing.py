"""A snapshot as text: bars are as long as they should be, nothing is wider than the terminal."""

import io
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mellmpi.console.drawing import END, FREE, FULL, MOVING, REST, bar, draw, plain
from tests.page.scene import Scene
from tests.page.snapshots import TWO, cluster, migration, segment, worker


def drawn(snapshot, width=120, height=None, rates=(1.0,)):
    file = io.StringIO()
    Console(file=file, width=width).print(draw(snapshot, list(rates), width, height))
    return file.getvalue()


REQUEST = st.builds(
    segment,
    st.integers(0, 10**6),
    kv_bytes=st.integers(1, 900),
    to=st.sampled_from([None, None, 2]),
)
REQUESTS = st.lists(REQUEST, max_size=12, unique_by=lambda r: r["id"])


@given(REQUESTS, st.integers(0, 500), st.integers(1, 200), st.integers(0, 4000))
def test_a_bar_has_exactly_its_cells_and_each_request_its_share(requests, rest, cells, capacity):
    used = sum(r["kv_bytes"] for r in requests) + rest
    one = worker(1, *requests, kv_bytes=used, kv_capacity=capacity)
    text = bar(one, cells).plain
    assert len(text) == cells
    whole = max(capacity, used, 1)
    assert abs(cells - text.count(FREE) - used / whole * cells) <= 0.5
    assert abs(text.count(REST) - rest / whole * cells) <= 1
    moving = sum(r["kv_bytes"] for r in requests if r["to"])
    assert abs(text.count(MOVING) - moving / whole * cells) <= len(requests)


def test_neighbours_are_told_apart_without_colours_and_a_moving_request_looks_different():
    one = worker(1, segment(3, 400), segment(4, 400, to=2), segment(5, 100))
    assert bar(one, 10).plain == FULL * 3 + END + MOVING * 4 + END + FREE


def test_the_figures_are_those_of_the_snapshot():
    moves = [migration(7, 1, 2, 0.0), migration(8, 2, 1, 0.0, outcome="refused", bytes=0)]
    text = drawn(cluster(*TWO["workers"], waiting=(21, 22), migrations=moves))
    for expected in (
        "small · frugal · up 61 s · live",
        "321 tokens/s",
        "1 of 2 workers active",
        "2 waiting, the oldest for 1.5 s: 21 22",
        "TTFT 120 ms, p99 480 ms · TPOT 21 ms, p99 34 ms · 40 % of GPU-seconds saved",
        "1 active          40%",
        "2 parked           0%",
        "4.0 MB",
        "refused",
    ):
        assert expected in text, text


def test_a_job_that_starts_says_so():
    none = {"p50": None, "p99": None}
    starting = worker(1, state="starting", kv_capacity=0, step_ms=None)
    text = drawn(cluster(starting, ready=False, reason="workers are starting", ttft_ms=none))
    assert "workers are starting" in text and "TTFT –" in text
    assert "No request waits." in text and "No request has moved yet." in text


def test_names_of_users_cannot_control_the_terminal():
    evil = worker(1, host="a\x1b[2Jb")
    text = drawn(cluster(evil, models=["[red]m\x1b]0;x\x07"], ready=False, reason="\x1b[1m"))
    assert "\x1b" not in text and "[red]m" in text and "a\\x1b[2J" in text


@cache
def simulated(num_workers):
    return Scene(num_workers, rate=num_workers, end_s=12).at(10.0)


@pytest.mark.parametrize(("width", "height"), [(40, 12), (80, 24), (120, 30), (200, 50), (120, 5)])
@pytest.mark.parametrize("num_workers", [1, 4, 64])
def test_nothing_is_wider_or_higher_than_the_terminal(width, height, num_workers):
    text = drawn(simulated(num_workers), width, height, rates=[0.0, 3.0, 5.0])
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 12)


def test_many_workers_are_beside_each_other_and_the_rest_is_counted():
    workers = [worker(w) for w in range(1, 65)]
    assert "64 active" in drawn(cluster(*workers), width=160, height=60)
    narrow = drawn(cluster(*workers), width=80, height=30)
    shown = sum(line.strip().split(" ")[0].isdigit() for line in narrow.splitlines()[3:])
    assert f"and {64 - shown} more workers" in narrow


def test_workers_beside_each_other_are_aligned_and_a_long_name_takes_no_second_line():
    workers = [
        worker(w, state="parked" if w % 3 else "active", host="a.very.long.name." * 9)
        for w in range(1, 41)
    ]
    lines = drawn(cluster(*workers), width=118, height=36).splitlines()[4:24]
    assert [int(line[60:63]) for line in lines] == list(range(21, 41))
    alone = drawn(cluster(*workers), width=120).splitlines()[4:44]
    assert [int(line[:3]) for line in alone] == list(range(1, 41))


def test_a_terminal_without_unicode_gets_ascii():
    text = plain(drawn(cluster(*TWO["workers"], migrations=[migration(7, 1, 2, 0.0)])))
    assert text.isascii() and "1 > 2" in text and "#" in text and "?" not in text
