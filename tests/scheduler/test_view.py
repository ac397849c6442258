"""The request columns that policies read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.protocol import ModelKv, kv_need
from mellmpi.scheduler import RequestColumns
from tests.scheduler.stage import KV, Stage, report, request

COLUMNS = (
    "request_id",
    "live",
    "worker",
    "movable",
    "num_tokens",
    "num_prompt",
    "block_size",
    "block_bytes",
)


def test_a_new_row_has_all_values_of_its_request():
    columns = RequestColumns()
    row = columns.add(request(7, num_prompt=5), KV)
    assert {name: getattr(columns, name)[row].item() for name in COLUMNS} == {
        "request_id": 7,
        "live": True,
        "worker": 0,
        "movable": False,
        "num_tokens": 5,
        "num_prompt": 5,
        "block_size": 4,
        "block_bytes": 10,
    }


def test_a_reused_row_is_reset():
    columns = RequestColumns(capacity=1)
    row = columns.add(request(7), KV)
    columns.worker[row], columns.movable[row], columns.num_tokens[row] = 3, True, 99
    columns.drop(row)
    assert not columns.live.any() and not columns.worker.any() and not columns.movable.any()
    assert columns.add(request(8, num_prompt=2), KV) == row
    assert (columns.num_tokens[row], columns.worker[row], columns.movable[row]) == (2, 0, False)


def test_each_row_counts_the_new_tokens_of_its_own_run():
    stage = Stage()
    first, second, third = (stage.running(i, num_prompt=i, max_tokens=3) for i in (7, 8, 9))
    runs = ((7, first.epoch, 0, (5, 6)), (8, second.epoch, 0, (5, 6, 6)), (9, third.epoch, 0, (5,)))
    stage.handle(1, report(*runs))
    counted = stage.scheduler.registry.view.requests.num_tokens
    assert counted[first.slot] == 7 + 2 and counted[third.slot] == 9 + 1
    assert stage.state(second) is None
    fourth = stage.running(10, num_prompt=4)
    assert fourth.slot == second.slot and counted[fourth.slot] == 4 + 1


def test_needs_are_whole_blocks_for_one_row_and_for_several():
    columns = RequestColumns()
    other = ModelKv("m", block_size=16, block_bytes=1)
    rows = [columns.add(request(i, num_prompt=i), kv) for i in (1, 4, 5) for kv in (KV, other)]
    needs = [columns.need(row) for row in rows]
    assert needs == [10, 1, 10, 1, 20, 1] == columns.kv_bytes(np.array(rows)).tolist()
    assert [kv_need(KV, n) for n in (0, 1, 4, 5)] == [0, 10, 10, 20]


@given(st.lists(st.one_of(st.just("add"), st.integers(0, 99)), max_size=40))
@pytest.mark.parametrize("capacity", [1, 2])
def test_rows_are_never_shared_and_grow_without_loss(capacity, steps):
    columns, rows, next_id = RequestColumns(capacity), {}, 0
    for step in steps:
        if step == "add":
            row = columns.add(request(next_id), KV)
            assert row not in rows
            rows[row], next_id = next_id, next_id + 1
        elif rows:
            row = sorted(rows)[step % len(rows)]
            columns.drop(row)
            del rows[row]
        assert set(np.flatnonzero(columns.live)) == set(rows)
        assert all(columns.request_id[row] == id for row, id in rows.items())
        assert (columns.block_size > 0).all()  # it divides
        assert len({len(getattr(columns, name)) for name in COLUMNS}) == 1
