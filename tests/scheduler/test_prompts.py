"""Prompt tokens that workers still have to compute."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mellmpi.protocol import FRONT, Cancel, KvReserved
from mellmpi.scheduler.prompts import QueuedPrompts
from mellmpi.scheduler.view import MoveProposal
from tests.scheduler.stage import Stage, received, report

WORKER, TOKENS = st.integers(1, 3), st.integers(1, 50)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["add", "end", "computed"]), WORKER, TOKENS)))
def test_no_worker_has_less_than_nothing_and_the_total_is_the_sum(calls):
    prompts, assigned = QueuedPrompts(), {1: [], 2: [], 3: []}
    for call, worker, num_tokens in calls:
        if call == "add":
            prompts.add(worker, num_tokens)
            assigned[worker].append(num_tokens)
        elif call == "computed":
            prompts.computed(worker, num_tokens)
        elif assigned[worker]:
            prompts.end(worker, assigned[worker].pop())
        at = [prompts.at(w) for w in assigned]
        assert all(0 <= left <= sum(assigned[w]) for w, left in zip(assigned, at, strict=True))
        assert prompts.total == sum(at)


def test_a_prompt_that_moves_before_it_is_computed_counts_at_its_new_worker():
    stage = Stage()
    record = stage.running(tokens=(), num_prompt=20)
    prompts = stage.scheduler.registry.prompts
    assert [prompts.at(w) for w in (1, 2)] == [20, 0]
    stage.tick(MoveProposal(7, 2, "test", "transfer"))
    stage.handle(2, KvReserved(7, record.offer.epoch, 0))
    stage.handle(2, received(record))
    assert record.worker == 2 and [prompts.at(w) for w in (1, 2)] == [0, 20]
    stage.handle(2, report((7, record.epoch, 0, (5,))))
    assert prompts.total == 0
    stage.handle(FRONT, Cancel(7, "gone"))
    assert prompts.total == 0
