"""The batch scheduler of one worker, rule by rule. Blocks hold 4 positions."""

import pytest

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.protocol import (
    DATA_PLANE,
    ROUNDS,
    SCHEDULER,
    Assign,
    BlocksArrived,
    BlocksSent,
    Cancel,
    DrainBlocks,
    HostedModel,
    KvFailed,
    KvPayload,
    KvReceived,
    KvRefused,
    KvReserved,
    Park,
    Parked,
    ReceiveBlocks,
    ReceiveKv,
    Release,
    Scoring,
    SendBlocks,
    SendKv,
    StepResult,
    Unfreeze,
)
from mellmpi.worker import BatchScheduler
from mellmpi.worker.batch import DECODE_ONLY_EVERY
from mellmpi.worker.sequences import Phase
from tests.scheduler.stage import KV, request

HOSTED = HostedModel(KV, "layout")
LOGPROB = (-0.5, (3,), (-0.5,))
IN, OUT = ROUNDS * 2, ROUNDS * 9  # tags of the first round, of epochs 2 and 9


class Bench:
    """One worker; each sampled token is 100, 101, 102 … in the order of sampling."""

    def __init__(
        self,
        num_blocks=8,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        prefix=False,
        target_step_ms=None,
    ):
        limits = BatchConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            target_step_ms=target_step_ms,
        )
        cache = CacheConfig(enable_prefix_caching=prefix)
        self.batch = BatchScheduler((HOSTED,), num_blocks, 0, limits, cache)
        self.next_token = 100
        self.sent = []  # messages of the last step

    def order(self, command):
        return self.batch.handle(SCHEDULER, command)

    def assign(self, request_id, epoch=None, outputs=(), **kwargs):
        epoch = epoch or request_id
        self.order(Assign(request(request_id, **kwargs), epoch, tuple(outputs)))
        return self.batch.sequences.get(epoch)

    def step(self, logprob=None):
        """Run one step. Returns its plan."""
        plan = self.batch.plan()
        if plan is not None:
            self.commit(plan, logprob)
        return plan

    def commit(self, plan, logprob=None):
        n = sum(chunk.sampling is not None for chunk in plan.chunks)
        tokens = tuple(range(self.next_token, self.next_token + n))
        self.next_token += n
        self.sent = self.batch.commit(plan, StepResult(tokens, (logprob,) * n))

    def chunks(self):
        """Run one step. Returns (request id, start, tokens, sampled) of each chunk."""
        plan = self.step()
        return [
            (c.request_id, c.start, len(c.tokens), c.sampling is not None)
            for c in (plan.chunks if plan else ())
        ]

    def receive(self, epoch=2, num_logged=1, num_prompt=3, **kwargs):
        order = ReceiveKv(
            request(7, num_prompt=num_prompt, **kwargs),
            epoch,
            2,
            num_logged,
            num_prompt + num_logged,
            0,
            (),
        )
        return self.order(order)


def header(num_computed=3, outputs=(5,), epoch=2, **fields):
    values = {
        "request_id": 7,
        "epoch": epoch,
        "fingerprint": "layout",
        "first_block": 0,
        "num_blocks": -(-num_computed // 4),
        "num_computed": num_computed,
        "outputs": outputs,
        "logprobs": (),
        "last": True,
        "tag": ROUNDS * epoch,
    }
    return KvPayload(**(values | fields))


@pytest.fixture
def bench():
    return Bench()


# --- steps ---------------------------------------------------------------------------------------


def test_with_nothing_to_compute_there_is_no_step(bench):
    assert bench.batch.plan() is None


def test_a_new_sequence_prefills_its_prompt_and_samples_then_decodes(bench):
    bench.assign(1, num_prompt=5)
    assert bench.chunks() == [(1, 0, 5, True)]
    assert bench.chunks() == [(1, 5, 1, True)]
    assert bench.batch.sequences[1].outputs == [100, 101]


def test_a_chunk_has_the_tokens_of_prompt_and_outputs_concatenated(bench):
    bench.assign(1, num_prompt=3, outputs=(8, 9))
    [chunk] = bench.batch.plan().chunks
    assert chunk.tokens == (0, 1, 2, 8, 9) and chunk.history == ((0, 1, 2), [8, 9])
    assert (
        len(chunk.block_table) == 2 and chunk.sampling is bench.batch.sequences[1].request.sampling
    )


def test_prefill_is_cut_to_the_token_budget_and_sampled_only_when_it_has_caught_up():
    bench = Bench(max_num_batched_tokens=8)
    bench.assign(1, num_prompt=19)
    assert bench.chunks() == [(1, 0, 8, False)]
    assert bench.chunks() == [(1, 8, 8, False)]
    assert bench.chunks() == [(1, 16, 3, True)]


SECONDS = (0.010, 0.002, 0.010, 0.0)  # of a step, a prefilled position, a decoded one


def timed(target_step_ms=None, num_decoding=0):
    """A worker with known step times, on which so many sequences decode."""
    bench = Bench(num_blocks=99, target_step_ms=target_step_ms)
    for request_id in range(50, 50 + num_decoding):
        bench.assign(request_id, num_prompt=1)
    bench.step()
    bench.batch.step_seconds = SECONDS
    return bench


def prompts(bench):
    """Run one step. Returns (request id, number of tokens) of each prompt chunk."""
    return [(i, n) for i, _, n, _ in bench.chunks() if n > 1]


def test_prompts_get_the_time_of_a_step_that_its_decodes_leave():
    bench = timed(num_decoding=3)  # 40 ms
    bench.assign(1, num_prompt=30)
    bench.assign(2, num_prompt=9)
    assert prompts(bench) == [(1, 20)], "twice 40 ms"
    assert prompts(bench) == [(1, 10), (2, 9)]


@pytest.mark.parametrize("target_step_ms, every", [(None, DECODE_ONLY_EVERY), (50, 99)])
def test_beside_prompts_some_steps_only_decode_so_that_their_time_is_known(target_step_ms, every):
    bench = Bench(num_blocks=400, target_step_ms=target_step_ms)
    bench.assign(50, num_prompt=1, max_tokens=99)
    bench.step()
    bench.batch.step_seconds = SECONDS
    bench.assign(1, num_prompt=900)
    steps = range(1, 2 * DECODE_ONLY_EVERY + 2)
    assert [i for i in steps if not prompts(bench)] == [i for i in steps if i % every == 0]


def test_a_prompt_limited_by_time_is_the_last_of_its_step():
    bench = timed(target_step_ms=100, num_decoding=2)
    bench.assign(1, num_prompt=45)
    bench.assign(2, num_prompt=9)
    assert prompts(bench) == [(1, 35)]


def test_prompts_advance_however_little_time_there_is():
    bench = timed(target_step_ms=1, num_decoding=3)
    bench.assign(1, num_prompt=30)
    assert prompts(bench) == [(1, 5)], "a fifth of the step"
    bench.batch.step_seconds = (0.010, 5.0, 0.010, 0.0)
    [(_, start, count, _)] = [c for c in bench.chunks() if c[0] == 1]
    assert (start, count) == (5, 1)


def test_the_token_limit_holds_if_there_is_time_for_more():
    bench = timed(target_step_ms=1e6, num_decoding=3)
    bench.assign(1, num_prompt=90)
    assert prompts(bench) == [(1, 61)]


def test_a_step_before_a_freeze_computes_few_prompt_tokens():
    bench = timed(num_decoding=3)
    bench.assign(1, num_prompt=90)
    assert prompts(bench) == [(1, 20)]
    bench.order(SendKv(50, 50, 2, 9, 0))
    assert prompts(bench) == [(1, 10)], "a third of the step"


def test_a_step_during_the_last_round_computes_few_prompt_tokens():
    bench = timed(num_decoding=3)
    bench.assign(1, num_prompt=90)
    bench.receive(num_prompt=18, num_logged=0)
    bench.batch.handle(2, header(num_computed=17, outputs=(), last=False))
    assert prompts(bench) == [(1, 20)], "most blocks are not announced yet"
    bench.batch.handle(2, header(17, (), first_block=5, num_blocks=1, last=False, tag=IN + 1))
    assert prompts(bench) == [(1, 10)]


def test_decodes_come_before_prefills_and_sampled_chunks_before_partial_ones():
    bench = Bench(max_num_batched_tokens=8)
    bench.assign(1, num_prompt=2)
    bench.step()
    bench.assign(2, num_prompt=10)
    bench.assign(3, num_prompt=2)
    assert bench.chunks() == [(1, 2, 1, True), (2, 0, 7, False)]
    assert bench.chunks() == [(1, 3, 1, True), (2, 7, 3, True), (3, 0, 2, True)]


def test_a_younger_decode_comes_before_an_older_prefill():
    bench = Bench(max_num_batched_tokens=8)
    bench.receive(num_prompt=18, num_logged=0)
    bench.assign(3, num_prompt=1)
    bench.step()
    bench.batch.handle(2, header(num_computed=4, outputs=()))
    bench.batch.handle(DATA_PLANE, BlocksArrived(7, 2, True, 0.1, IN, ""))
    assert bench.chunks() == [(3, 1, 1, True), (7, 4, 7, False)]


def test_no_more_sequences_than_max_num_seqs_take_part():
    bench = Bench(max_num_seqs=2, max_num_batched_tokens=64)
    for i in (1, 2, 3):
        bench.assign(i, num_prompt=2, max_tokens=2)
    assert [c[0] for c in bench.chunks()] == [1, 2]
    assert [c[0] for c in bench.chunks()] == [1, 2]
    assert [c[0] for c in bench.chunks()] == [3]


def test_the_blocks_of_a_finished_sequence_are_freed(bench):
    bench.assign(1, num_prompt=5, max_tokens=2)
    bench.step()
    assert bench.batch.free_bytes == 60
    bench.step()
    assert bench.batch.free_bytes == 80 and not bench.batch.sequences


def test_the_last_token_needs_no_block():
    bench = Bench(num_blocks=1)
    bench.assign(1, num_prompt=4, max_tokens=1)
    assert bench.chunks() == [(1, 0, 4, True)]
    assert not bench.batch.report(1, 0.1).preempted


def test_a_stop_token_ends_the_sequence(bench):
    bench.assign(1, num_prompt=2, stop_token_ids=(100,))
    bench.step()
    assert not bench.batch.sequences


def test_nothing_is_handled_between_plan_and_commit(bench):
    bench.assign(1)
    plan = bench.batch.plan()
    with pytest.raises(AssertionError, match="between plan and commit"):
        bench.order(Release(1, 1))
    bench.commit(plan)
    bench.order(Release(1, 1))


def test_a_result_that_does_not_fit_its_plan_is_a_bug(bench):
    bench.assign(1)
    bench.assign(2)
    plan = bench.batch.plan()
    with pytest.raises((ValueError, StopIteration)):
        bench.batch.commit(plan, StepResult((5,), (None,)))


def test_a_plan_that_is_not_the_last_one_made_is_a_bug(bench):
    bench.assign(1)
    first = bench.step()
    bench.assign(2)
    bench.batch.plan()
    with pytest.raises(ValueError, match="zip"):
        bench.batch.commit(first, StepResult((5,), (None,)))


def test_an_unknown_message_is_a_bug(bench):
    with pytest.raises(TypeError):
        bench.order(Cancel(1, "gone"))


# --- blocks --------------------------------------------------------------------------------------


def test_an_assignment_without_room_is_preempted_at_once():
    bench = Bench(num_blocks=1)
    assert bench.assign(1, num_prompt=5) is None
    report = bench.batch.report(0, 0.0)
    assert report.preempted == ((1, 1),) and report.free_bytes == 10


def test_the_youngest_is_preempted_for_an_older_one():
    bench = Bench(num_blocks=3)
    bench.assign(1, num_prompt=4)
    bench.assign(2, num_prompt=4)
    bench.assign(3, num_prompt=4)
    bench.step()
    assert bench.chunks() == [(1, 4, 1, True)]
    assert bench.batch.report(2, 0.2).preempted == ((3, 3), (2, 2))


def test_the_youngest_is_preempted_if_it_needs_a_block_itself():
    bench = Bench(num_blocks=3)
    bench.assign(1, num_prompt=5)
    bench.assign(2, num_prompt=4)
    bench.step()
    assert bench.chunks() == [(1, 5, 1, True)]
    assert bench.batch.report(2, 0.2).preempted == ((2, 2),)


def test_tokens_computed_before_a_preemption_are_reported():
    bench = Bench(num_blocks=2)
    bench.assign(1, num_prompt=4)
    bench.assign(2, num_prompt=4)
    bench.step()
    bench.step()
    report = bench.batch.report(2, 0.2)
    assert report.request_ids == (1, 2) and report.counts == (2, 1)
    assert report.tokens == (100, 102, 101) and report.preempted == ((2, 2),)


def test_a_release_frees_the_blocks_and_an_unknown_one_changes_nothing(bench):
    bench.assign(1, num_prompt=5)
    assert bench.order(Release(1, 99)) == [] and bench.batch.free_bytes == 60
    assert bench.order(Release(1, 1)) == [] and bench.batch.free_bytes == 80
    assert bench.order(Release(1, 1)) == []


# --- reports -------------------------------------------------------------------------------------


def test_a_report_covers_the_steps_since_the_last_one(bench):
    bench.assign(1, num_prompt=5)
    bench.assign(2, num_prompt=2)
    bench.step()
    bench.step()
    report = bench.batch.report(2, 0.5)
    assert (report.steps, report.step_s, report.acked, report.free_bytes) == (2, 0.5, 2, 50)
    assert (report.prefill_tokens, report.decode_tokens) == (5, 4)
    assert (report.request_ids, report.epochs, report.firsts) == ((1, 2), (1, 2), (0, 0))
    assert (report.counts, report.tokens) == ((2, 2), (100, 102, 101, 103))
    bench.step()
    report = bench.batch.report(1, 0.1)
    assert (report.firsts, report.counts, report.tokens) == ((2, 2), (1, 1), (104, 105))
    assert (report.prefill_tokens, report.decode_tokens) == (0, 2)


def test_a_resumed_sequence_reports_only_new_tokens(bench):
    bench.assign(1, outputs=(8, 9))
    bench.step()
    report = bench.batch.report(1, 0.1)
    assert (report.firsts, report.tokens) == ((2,), (100,))


def test_with_no_news_there_is_no_report(bench):
    bench.assign(1, num_prompt=4)
    assert bench.batch.report(0, 0.0) is not None  # acknowledged
    assert bench.batch.report(0, 0.0) is None
    bench.step()
    assert bench.batch.report(1, 0.1) is not None
    assert bench.batch.report(0, 0.0) is None


def test_an_acknowledgement_alone_is_news(bench):
    bench.order(Release(9, 9))
    assert bench.batch.report(0, 0.0).acked == 1


def test_freed_blocks_alone_are_news(bench):
    bench.assign(1)
    bench.batch.report(0, 0.0)
    bench.batch.acked -= 1
    bench.order(Release(1, 1))
    assert bench.batch.report(0, 0.0).free_bytes == 80


def test_only_messages_of_the_scheduler_are_acknowledged(bench):
    bench.receive()
    bench.batch.handle(2, header())
    bench.batch.handle(DATA_PLANE, BlocksArrived(7, 2, True, 0.1, IN, ""))
    assert bench.batch.acked == 1


def test_a_worker_that_wakes_continues_the_count_of_messages():
    batch = BatchScheduler((HOSTED,), 2, 5, BatchConfig(), CacheConfig())
    batch.handle(SCHEDULER, Park())
    assert batch.acked == 6


def test_logprobs_are_reported_once_with_their_run(bench):
    bench.assign(1)
    bench.assign(2)
    bench.step()
    assert bench.batch.report(1, 0.1).logprobs == ()
    bench.order(Release(1, 1))
    bench.assign(3)
    bench.batch.sequences[2].logprobs[0] = LOGPROB
    bench.step(LOGPROB)
    assert bench.batch.report(1, 0.1).logprobs == ((0, (LOGPROB,)), (1, (LOGPROB,)))
    bench.step(LOGPROB)
    bench.step(LOGPROB)
    assert bench.batch.report(1, 0.1).logprobs == ((0, (LOGPROB,) * 2), (1, (LOGPROB,) * 2))


def test_every_chunk_of_a_prompt_has_the_tokens_to_score(bench):
    bench = Bench(max_num_batched_tokens=8)
    bench.assign(1, num_prompt=18, num_prompt_logprobs=2)
    chunks = []
    for _ in range(4):
        plan = bench.batch.plan()
        chunks += plan.chunks
        scored = [((LOGPROB, 1),) * len(c.scoring.tokens) for c in plan.chunks if c.scoring]
        sampled = [c for c in plan.chunks if c.sampling is not None]
        result = StepResult((5,) * len(sampled), (None,) * len(sampled), tuple(scored))
        bench.batch.commit(plan, result)
    expected = [tuple(range(1, 9)), tuple(range(9, 17)), (17,)]
    assert [c.scoring for c in chunks] == [*(Scoring(tokens, 2) for tokens in expected), None]
    assert bench.batch.report(4, 0.1).prompt_logprobs == ((0, ((LOGPROB, 1),) * 17),)


def test_a_request_with_outputs_is_not_scored_again(bench):
    bench.assign(1, num_prompt=6, num_prompt_logprobs=2, outputs=(5,))
    [chunk] = bench.step().chunks
    assert len(chunk.tokens) == 7 and chunk.scoring is None
    assert bench.batch.report(1, 0.1).prompt_logprobs == ()


# --- sending -------------------------------------------------------------------------------------


def sending(bench, num_prompt=5):
    """Request 7 after one step, a migration to worker 3 under epoch 9, and the last step."""
    sequence = bench.assign(7, epoch=1, num_prompt=num_prompt)
    bench.step()
    announced = bench.order(SendKv(7, 1, dst=3, dst_epoch=9, start=0))
    bench.step()
    return sequence, announced + bench.sent


def test_the_source_announces_all_blocks_then_makes_a_step_then_sends_them(bench):
    sequence, commands = sending(bench)
    assert commands == [
        (3, header(num_computed=5, outputs=(), epoch=9, last=False)),
        (3, header(num_computed=6, outputs=(100, 101), epoch=9, first_block=2, num_blocks=0)),
        (DATA_PLANE, SendBlocks(7, 1, dst=3, tag=OUT, block_ids=tuple(sequence.block_table))),
    ]


def test_a_block_without_computed_positions_is_not_sent():
    bench = Bench(max_num_batched_tokens=8)
    sequence = bench.assign(7, epoch=1, num_prompt=19)
    bench.step()
    [(_, head), (_, blocks)] = bench.order(SendKv(7, 1, 3, 9, 0))
    assert (head.num_blocks, head.num_computed) == (2, 8)
    assert blocks.block_ids == tuple(sequence.block_table[:2])


def test_with_nothing_computed_only_the_header_is_sent(bench):
    bench.assign(7, epoch=1, outputs=(5,))
    assert bench.order(SendKv(7, 1, 3, 9, 0)) == [(3, header(num_computed=0, epoch=9))]
    assert not bench.batch.sequences[1].in_flight


def test_all_logprobs_of_this_owner_are_sent(bench):
    bench.assign(7, epoch=1)
    bench.step(LOGPROB)
    bench.batch.report(1, 0.1)
    bench.step(LOGPROB)
    [(_, head)] = bench.order(SendKv(7, 1, 3, 9, 0))
    assert head.logprobs == ()
    bench.step(LOGPROB)
    [(_, head), _] = bench.sent
    assert head.logprobs == ((0, LOGPROB), (1, LOGPROB), (2, LOGPROB))


def test_a_frozen_sequence_is_not_computed_and_keeps_its_blocks(bench):
    sequence, _ = sending(bench)
    assert bench.batch.plan() is None and bench.batch.free_bytes == 60
    assert sequence.phase is Phase.FROZEN


def test_a_sequence_that_has_ended_is_not_sent(bench):
    assert bench.order(SendKv(7, 1, 3, 9, 0)) == []


def test_a_sequence_released_during_a_send_keeps_its_blocks_until_the_end_of_the_send(bench):
    sending(bench)
    bench.order(Release(7, 1))
    assert bench.batch.free_bytes == 60 and not bench.batch.sequences
    assert bench.batch.handle(DATA_PLANE, BlocksSent(7, 1, OUT)) == []
    assert bench.batch.free_bytes == 80 and not bench.batch.lingering


def test_a_sequence_released_after_the_send_frees_its_blocks_at_once(bench):
    sending(bench)
    bench.batch.handle(DATA_PLANE, BlocksSent(7, 1, OUT))
    assert bench.batch.free_bytes == 60
    bench.order(Release(7, 1))
    assert bench.batch.free_bytes == 80


def test_an_unfrozen_sequence_decodes_on_after_the_end_of_the_send(bench):
    sending(bench)
    bench.order(Unfreeze(7, 1))
    assert bench.batch.plan() is None
    bench.batch.handle(DATA_PLANE, BlocksSent(7, 1, OUT))
    assert bench.chunks() == [(7, 6, 1, True)]


def test_unfreezing_a_sequence_that_has_ended_changes_nothing(bench):
    assert bench.order(Unfreeze(7, 1)) == []


def test_blocks_of_two_sends_are_kept_until_both_have_ended(bench):
    sending(bench)
    bench.order(Unfreeze(7, 1))
    bench.order(SendKv(7, 1, 3, 10, 0))
    bench.order(Release(7, 1))
    bench.batch.handle(DATA_PLANE, BlocksSent(7, 1, OUT))
    assert bench.batch.free_bytes == 60
    bench.batch.handle(DATA_PLANE, BlocksSent(7, 1, ROUNDS * 10))
    assert bench.batch.free_bytes == 80


@pytest.mark.parametrize("unfrozen", [False, True])
def test_a_sequence_whose_blocks_are_being_sent_is_not_preempted(unfrozen):
    bench = Bench(num_blocks=3)
    bench.assign(2, num_prompt=4)
    sending(bench)
    if unfrozen:
        bench.order(Unfreeze(7, 1))
    assert bench.step() is None
    assert bench.batch.report(2, 0.1).preempted == ((2, 2),)


# --- receiving -----------------------------------------------------------------------------------


def test_the_destination_reserves_blocks_for_all_known_tokens_and_waits(bench):
    assert bench.receive(num_prompt=4) == [(SCHEDULER, KvReserved(7, 2, 0))]
    assert bench.batch.free_bytes == 60 and bench.batch.plan() is None


def test_a_destination_without_room_refuses_and_keeps_nothing():
    bench = Bench(num_blocks=1)
    assert bench.receive(num_prompt=4) == [(SCHEDULER, KvRefused(7, 2))]
    assert bench.batch.free_bytes == 10 and not bench.batch.sequences


def test_a_reservation_is_not_preempted():
    bench = Bench(num_blocks=2)
    bench.assign(1, num_prompt=4)
    bench.receive()
    bench.step()
    assert bench.step() is None
    assert bench.batch.report(2, 0.1).preempted == ((1, 1),)


def test_a_header_posts_the_receive_of_its_blocks(bench):
    bench.receive(num_prompt=6)
    [(to, order)] = bench.batch.handle(2, header(num_computed=6))
    table = bench.batch.sequences[2].block_table
    assert (to, order) == (DATA_PLANE, ReceiveBlocks(7, 2, src=2, tag=IN, block_ids=tuple(table)))
    assert bench.batch.plan() is None


def test_once_all_blocks_are_present_the_destination_sends_the_tokens_that_are_not_logged(bench):
    bench.receive(num_logged=1)
    bench.batch.handle(2, header(num_computed=5, outputs=(5, 6, 7)))
    commands = bench.batch.handle(DATA_PLANE, BlocksArrived(7, 2, True, 0.25, IN, ""))
    assert commands == [(SCHEDULER, KvReceived(7, 2, 1, (6, 7), (), 20, 0.25))]
    assert bench.chunks() == [(7, 5, 1, True)]
    report = bench.batch.report(1, 0.1)
    assert (report.firsts, report.tokens) == ((3,), (100,))


def test_the_destination_sends_the_logprobs_of_tokens_that_are_not_logged(bench):
    bench.receive(num_logged=1, num_logprobs=1)
    others = tuple((-i, (i,), (-i,)) for i in range(3))
    bench.batch.handle(2, header(5, (5, 6, 7), logprobs=tuple(enumerate(others))))
    [(_, received)] = bench.batch.handle(DATA_PLANE, BlocksArrived(7, 2, True, 0.25, IN, ""))
    assert received.logprobs == others[1:]
    bench.step(LOGPROB)
    assert bench.batch.report(1, 0.1).logprobs == ((0, (LOGPROB,)),)


def test_a_sequence_received_in_mid_prefill_is_prefilled_on(bench):
    bench.receive(num_prompt=10, num_logged=0)
    bench.batch.handle(2, header(num_computed=8, outputs=()))
    bench.batch.handle(DATA_PLANE, BlocksArrived(7, 2, True, 0.25, IN, ""))
    assert bench.chunks() == [(7, 8, 2, True)]


def test_without_blocks_to_send_the_destination_owns_the_request_at_once(bench):
    bench.receive()
    commands = bench.batch.handle(2, header(num_computed=0))
    assert commands == [(SCHEDULER, KvReceived(7, 2, 1, (), (), 0, 0.0))]
    assert bench.chunks() == [(7, 0, 4, True)]


def test_a_sequence_grown_since_the_reservation_gets_more_blocks(bench):
    bench.receive(num_prompt=3)
    bench.batch.handle(2, header(num_computed=9, outputs=tuple(range(7))))
    assert len(bench.batch.sequences[2].block_table) == 3


def test_a_sequence_grown_too_much_fails_and_its_blocks_are_drained():
    bench = Bench(num_blocks=2)
    bench.receive(num_prompt=3)
    commands = bench.batch.handle(2, header(num_computed=9, outputs=tuple(range(7))))
    assert commands == [
        (DATA_PLANE, DrainBlocks(src=2, tag=IN, num_blocks=3)),
        (SCHEDULER, KvFailed(7, 2, "no room for what it has grown by")),
    ]
    assert bench.batch.free_bytes == 20 and not bench.batch.sequences


def test_kv_of_another_layout_fails_and_its_blocks_are_drained(bench):
    bench.receive()
    [(_, drain), (_, failed)] = bench.batch.handle(2, header(fingerprint="other"))
    assert drain == DrainBlocks(2, IN, 1)
    assert failed == KvFailed(7, 2, "KV layout other is not ours (layout)")
    assert bench.batch.free_bytes == 80


@pytest.mark.parametrize(
    ("num_computed", "drained"), [(3, [(DATA_PLANE, DrainBlocks(2, IN, 1))]), (0, [])]
)
def test_blocks_of_a_released_sequence_are_drained(bench, num_computed, drained):
    bench.receive()
    bench.order(Release(7, 2))
    assert bench.batch.free_bytes == 80
    assert bench.batch.handle(2, header(num_computed)) == drained


def test_a_failed_transfer_fails_the_migration_and_frees_the_blocks(bench):
    bench.receive()
    bench.batch.handle(2, header())
    commands = bench.batch.handle(DATA_PLANE, BlocksArrived(7, 2, False, 0.1, IN, "peer lost"))
    assert commands == [(SCHEDULER, KvFailed(7, 2, "peer lost"))]
    assert bench.batch.free_bytes == 80


@pytest.mark.parametrize("ok", [True, False])
def test_a_sequence_released_during_a_receive_keeps_its_blocks_until_the_end_of_the_receive(
    bench, ok
):
    bench.receive()
    bench.batch.handle(2, header())
    bench.order(Release(7, 2))
    assert bench.batch.free_bytes == 70
    assert (
        bench.batch.handle(DATA_PLANE, BlocksArrived(7, 2, ok, 0.1, IN, "" if ok else "checksum"))
        == []
    )
    assert bench.batch.free_bytes == 80


# --- prefix reuse --------------------------------------------------------------------------------


@pytest.fixture
def caching():
    return Bench(prefix=True)


def test_full_blocks_of_the_same_prefix_are_not_computed_again(caching):
    first = caching.assign(1, num_prompt=9)
    caching.step()
    second = caching.assign(2, num_prompt=10)
    assert second.block_table[:2] == first.block_table[:2]
    assert caching.chunks() == [(1, 9, 1, True), (2, 8, 2, True)]
    assert first.num_registered == second.num_registered == 2


def test_at_least_one_position_is_left_to_compute(caching):
    caching.assign(1, num_prompt=8)
    caching.step()
    caching.assign(2, num_prompt=8)
    assert caching.chunks()[1] == (2, 4, 4, True)


def test_a_prefix_is_reused_after_its_sequence_has_ended(caching):
    caching.assign(1, num_prompt=9, max_tokens=1)
    caching.step()
    assert caching.batch.free_bytes == 80
    caching.assign(2, num_prompt=9)
    assert caching.chunks() == [(2, 8, 1, True)]


def test_outputs_are_reused_as_prompts_are(caching):
    caching.assign(1, num_prompt=3, max_tokens=7)
    for _ in range(7):
        caching.step()
    caching.assign(2, num_prompt=3, outputs=tuple(range(100, 106)))
    assert caching.chunks() == [(2, 8, 1, True)]


def test_received_blocks_are_reused(caching):
    caching.receive(num_prompt=8)
    caching.batch.handle(2, header(num_computed=8))
    caching.batch.handle(DATA_PLANE, BlocksArrived(7, 2, True, 0.1, IN, ""))
    caching.assign(8, num_prompt=9)
    assert caching.chunks() == [(7, 8, 1, True), (8, 8, 1, True)]


def test_blocks_that_are_not_computed_yet_are_not_reused():
    caching = Bench(prefix=True, max_num_batched_tokens=8)
    caching.assign(1, num_prompt=12)
    caching.step()
    caching.assign(2, num_prompt=13)
    assert caching.batch.sequences[2].num_computed == 8


def test_a_report_says_how_much_of_each_new_request_was_cached(caching):
    caching.assign(1, num_prompt=9)
    caching.step()
    caching.assign(2, num_prompt=9)
    caching.assign(3, num_prompt=3, outputs=(100, 101))  # not new
    assert caching.batch.report(1, 0.1).cached == ((1, 0), (2, 8))
    assert caching.batch.report(0, 0.0) is None


def test_without_the_option_nothing_is_reused(bench):
    bench.assign(1, num_prompt=9)
    bench.step()
    bench.assign(2, num_prompt=9)
    assert bench.batch.report(1, 0.1).cached == ()
    assert bench.chunks()[1] == (2, 0, 9, True)
    assert not any(
        s.keys for s in bench.batch.sequences.values()
    )  # no time is spent on keys either


def test_shared_blocks_are_freed_with_the_last_sequence_that_holds_them(caching):
    caching.assign(1, num_prompt=9)
    caching.step()
    caching.assign(2, num_prompt=9)
    caching.order(Release(1, 1))
    assert caching.batch.free_bytes == 50
    caching.order(Release(2, 2))
    assert caching.batch.free_bytes == 80


# --- parking -------------------------------------------------------------------------------------


def test_an_empty_worker_parks_at_once_and_sends_parked_once(bench):
    assert bench.order(Park()) == [(SCHEDULER, Parked(acked=1))]
    assert bench.batch.handle(2, header()) == [(DATA_PLANE, DrainBlocks(2, IN, 1))]


def test_a_worker_with_a_sequence_parks_after_the_sequence_has_ended(bench):
    bench.assign(1)
    assert bench.order(Park()) == []
    assert bench.order(Release(1, 1)) == [(SCHEDULER, Parked(acked=3))]


def test_a_worker_with_a_send_in_progress_parks_after_the_send_has_ended(bench):
    sending(bench)
    bench.order(Release(7, 1))
    assert bench.order(Park()) == []
    assert bench.batch.handle(DATA_PLANE, BlocksSent(7, 1, OUT)) == [(SCHEDULER, Parked(acked=4))]


def test_another_batch_scheduler_accepts_what_a_source_sends(bench):
    _, [(_, announced), (_, last), _] = sending(bench)
    other = Bench()
    other.receive(epoch=9, num_prompt=5)
    [(_, order)] = other.batch.handle(1, announced)
    assert isinstance(order, ReceiveBlocks) and len(order.block_ids) == 2
    assert other.batch.handle(1, last) == []
    [(_, received)] = other.batch.handle(DATA_PLANE, BlocksArrived(7, 9, True, 0.1, OUT, ""))
    assert isinstance(received, KvReceived) and other.chunks() == [(7, 6, 1, True)]
