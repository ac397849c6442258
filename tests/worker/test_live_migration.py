"""Migrations in rounds while the sequence decodes, and splits. Blocks hold 4 positions."""

import pytest

from mellmpi.protocol import (
    DATA_PLANE,
    ROUNDS,
    SCHEDULER,
    BlocksArrived,
    BlocksSent,
    DrainBlocks,
    KvFailed,
    KvPayload,
    KvReceived,
    KvReserved,
    PartComputed,
    ReceiveBlocks,
    ReceiveKv,
    Release,
    SendBlocks,
    SendKv,
    StepResult,
    Unfreeze,
)
from mellmpi.worker.sequences import Phase
from tests.scheduler.stage import request
from tests.worker.test_batch import Bench, header

TAG = ROUNDS * 9  # of the first round of epoch 9


@pytest.fixture
def bench():
    return Bench(num_blocks=20)


def begin(bench, num_prompt=17, start=0, epoch=1):
    """A sequence of 17 computed positions: four full blocks and a half-full one."""
    sequence = bench.assign(7, epoch=epoch, num_prompt=num_prompt, max_tokens=100)
    bench.step()
    return sequence, bench.order(SendKv(7, epoch, 3, 9, start))


def sent(bench, which):
    return bench.batch.handle(DATA_PLANE, BlocksSent(7, 1, TAG + which))


def go(bench):
    """Run one step. Returns the messages sent after it."""
    bench.step()
    return bench.sent


# --- the source ----------------------------------------------------------------------------------


def test_full_blocks_are_sent_first_and_the_sequence_decodes_on(bench):
    sequence, [(_, head), (_, blocks)] = begin(bench)
    assert (head.first_block, head.num_blocks, head.last, head.tag) == (0, 4, False, TAG)
    assert (head.outputs, head.logprobs) == ((), ())
    assert blocks == SendBlocks(7, 1, 3, TAG, tuple(sequence.block_table[:4]))
    assert bench.chunks() == [(7, 17, 1, True)] and sequence.phase is Phase.RUNNING


def test_the_remaining_blocks_are_announced_one_step_before_the_freeze(bench):
    sequence, _ = begin(bench)
    for _ in range(5):
        bench.step()
    [(_, head)] = sent(bench, 0)
    assert (head.first_block, head.num_blocks, head.last, head.tag) == (4, 2, False, TAG + 1)
    assert head.outputs == () and sequence.phase is Phase.RUNNING
    [(_, head), (_, blocks)] = go(bench)
    assert (head.first_block, head.num_blocks, head.last) == (6, 0, True)
    assert head.num_computed == 23 and head.outputs == tuple(sequence.outputs)
    assert blocks == SendBlocks(7, 1, 3, TAG + 1, tuple(sequence.block_table[4:6]))
    assert sequence.phase is Phase.FROZEN and bench.batch.plan() is None
    assert sent(bench, 1) == []


@pytest.mark.parametrize(("computed", "num_blocks"), [(19, 1), (20, 2), (21, 2)])
def test_the_step_before_the_freeze_may_begin_a_block(bench, computed, num_blocks):
    begin(bench)
    for _ in range(computed - 17):
        bench.step()
    [(_, head)] = sent(bench, 0)
    assert head.num_blocks == num_blocks
    [(_, head), (_, blocks)] = go(bench)
    assert head.num_computed == computed + 1 and len(blocks.block_ids) == num_blocks


def test_an_announced_sequence_is_frozen_though_other_sequences_are_computed():
    bench = Bench(num_blocks=20, max_num_seqs=1)
    bench.assign(1, epoch=5, num_prompt=3)
    bench.step()
    bench.assign(7, epoch=1, num_prompt=3)
    bench.batch.sequences[1].num_computed = 3
    bench.batch.sequences[1].outputs.append(50)
    assert len(bench.order(SendKv(7, 1, 3, 9, 0))) == 1
    [(_, head), (_, blocks)] = go(bench)
    assert head.last and head.num_computed == 3 and len(blocks.block_ids) == 1


def test_a_prefilling_sequence_is_frozen_at_once():
    bench = Bench(num_blocks=20, max_num_batched_tokens=8)
    bench.assign(7, epoch=1, num_prompt=17)
    bench.step()
    [(_, head), (_, blocks)] = bench.order(SendKv(7, 1, 3, 9, 4))
    assert (head.num_computed, head.num_blocks, head.last) == (8, 1, True)
    assert len(blocks.block_ids) == 1


@pytest.mark.parametrize("order", [Release(7, 1), Unfreeze(7, 1)])
def test_announced_blocks_are_sent_after_an_abort(bench, order):
    sequence, _ = begin(bench)
    sent(bench, 0)
    [(to, blocks)] = bench.order(order)
    assert to == DATA_PLANE and blocks.block_ids == tuple(sequence.block_table[4:5])
    assert bench.batch.plan() is None, "a half-full block is not written while it is sent"
    assert sent(bench, 1) == []
    stays = isinstance(order, Unfreeze)
    assert bench.batch.free_bytes == (150 if stays else 200) and bool(bench.chunks()) == stays


def test_announced_blocks_are_sent_if_the_sequence_finishes_in_that_step(bench):
    sequence = bench.assign(7, epoch=1, num_prompt=5, max_tokens=2)
    bench.step()
    bench.order(SendKv(7, 1, 3, 9, 0))
    assert go(bench) == [(DATA_PLANE, SendBlocks(7, 1, 3, TAG, tuple(sequence.block_table)))]
    assert not bench.batch.sequences and bench.batch.free_bytes == 180
    assert sent(bench, 0) == [] and bench.batch.free_bytes == 200


def test_an_announced_sequence_is_not_preempted():
    bench = Bench(num_blocks=3)
    bench.assign(2, num_prompt=4)
    bench.step()
    bench.assign(7, epoch=1, num_prompt=1)
    bench.step()
    bench.order(SendKv(7, 1, 3, 9, 0))
    assert [c[0] for c in bench.chunks()] == [2, 7]
    assert bench.batch.report(1, 0.1).preempted == ()


def test_blocks_that_became_full_meanwhile_are_another_round(bench):
    begin(bench)
    for _ in range(12):
        bench.step()
    [(_, head), _] = sent(bench, 0)
    assert (head.first_block, head.num_blocks, head.last) == (4, 3, False)


def test_if_rounds_do_not_shrink_the_remaining_blocks_are_announced(bench):
    begin(bench)
    for _ in range(16):
        bench.step()
    [(_, head)] = sent(bench, 0)
    assert (head.num_blocks, head.last) == (5, False)
    [(_, head), _] = go(bench)
    assert head.last


def test_with_the_last_tag_the_remaining_blocks_are_announced(bench):
    sequence, _ = begin(bench)
    for _ in range(12):
        bench.step()
    sequence.outgoing.round = ROUNDS - 2
    [(_, head)] = sent(bench, ROUNDS - 2)
    assert head.num_blocks == 4 and head.tag == TAG + ROUNDS - 1
    [(_, head), _] = go(bench)
    assert head.last


def test_blocks_before_start_are_not_sent(bench):
    _, [(_, head), (_, blocks)] = begin(bench, start=8)
    assert (head.first_block, head.num_blocks, len(blocks.block_ids)) == (2, 2, 2)


def test_a_source_that_has_not_computed_up_to_start_sends_no_blocks():
    bench = Bench(max_num_batched_tokens=8)
    _, commands = begin(bench, start=12)
    [(_, head)] = commands
    assert (head.first_block, head.num_blocks, head.num_computed, head.last) == (3, 0, 8, True)


def test_after_a_release_no_further_round_begins(bench):
    begin(bench)
    bench.order(Release(7, 1))
    assert bench.batch.free_bytes == 150
    assert sent(bench, 0) == [] and bench.batch.free_bytes == 200


def test_after_an_abort_no_further_round_begins(bench):
    begin(bench)
    bench.order(Unfreeze(7, 1))
    assert bench.chunks() == [(7, 17, 1, True)]
    assert sent(bench, 0) == [] and bench.chunks() == [(7, 18, 1, True)]


def test_the_end_of_a_round_of_a_failed_migration_begins_no_round_of_the_next(bench):
    begin(bench)
    bench.order(Unfreeze(7, 1))
    bench.order(SendKv(7, 1, 3, 10, 0))
    assert sent(bench, 0) == []
    bench.batch.handle(DATA_PLANE, BlocksSent(7, 1, ROUNDS * 10))
    [(_, head), _] = go(bench)
    assert head.epoch == 10 and head.last


def test_a_sequence_without_room_to_grow_waits_and_is_frozen_as_it_is():
    bench = Bench(num_blocks=5)
    sequence, _ = begin(bench)
    for _ in range(3):
        bench.step()
    assert sequence.num_tokens == 21 and bench.batch.plan() is None
    [(_, head), _] = sent(bench, 0)
    assert head.last and head.num_computed == 20
    assert bench.batch.report(1, 0.1).preempted == ()


def test_a_younger_sequence_is_preempted_for_one_that_migrates():
    bench = Bench(num_blocks=7)
    bench.assign(1, epoch=5, num_prompt=1, max_tokens=4)
    begin(bench, epoch=1)
    bench.assign(2, epoch=6, num_prompt=3)
    held = []
    for _ in range(3):
        bench.step()
        held.append(sorted(bench.batch.sequences))
    assert held[0] == [1, 5, 6] and 5 in held[1]
    for _ in range(9):
        bench.step()
    assert bench.batch.sequences.keys() == {1}
    assert bench.batch.report(1, 0.1).preempted == ((2, 6),)


def test_an_older_sequence_is_not_preempted_for_one_that_migrates():
    bench = Bench(num_blocks=7)
    bench.assign(1, epoch=5, num_prompt=4)
    sequence, _ = begin(bench)
    for _ in range(3):
        bench.step()
    assert sequence.num_tokens == 21
    assert [c[0] for c in bench.chunks()] == [1]
    assert bench.batch.sequences.keys() == {1, 5}


def test_an_unfrozen_sequence_does_not_write_the_half_full_block_in_transfer(bench):
    begin(bench)
    sent(bench, 0)
    go(bench)
    assert bench.order(Unfreeze(7, 1)) == [] and bench.batch.plan() is None
    assert sent(bench, 1) == [] and bench.chunks() == [(7, 18, 1, True)]


# --- the source of a split -----------------------------------------------------------------------


def computed(bench, epoch=9):
    """The destination has computed its part."""
    return bench.batch.handle(3, PartComputed(7, epoch))


def steps(bench, number):
    """Run so many steps. Returns the messages sent after them."""
    return [command for _ in range(number) for command in go(bench)]


def test_while_the_destination_computes_the_source_decodes_on_and_sends_full_blocks(bench):
    begin(bench, start=8)
    [(_, head)] = sent(bench, 0)
    assert (head.first_block, head.num_blocks, head.last, head.tag) == (4, 1, False, TAG + 1)
    assert steps(bench, 2) == []
    [(to, blocks)] = go(bench)
    assert (to, blocks.tag, len(blocks.block_ids)) == (DATA_PLANE, TAG + 1, 1)
    assert bench.chunks() == [(7, 20, 1, True)], "a full block is only read"
    [(_, head)] = sent(bench, 1)
    assert (head.first_block, head.num_blocks, head.last, head.tag) == (5, 1, False, TAG + 2)
    assert steps(bench, 2) == [] and bench.batch.sequences[1].phase is Phase.RUNNING


def test_part_computed_freezes_the_sequence_and_sends_the_announced_blocks(bench):
    sequence, _ = begin(bench, start=8)
    sent(bench, 0)
    bench.step()
    [(_, head), (_, blocks)] = computed(bench)
    assert (head.first_block, head.num_blocks, head.last) == (5, 0, True)
    assert head.num_computed == 18 and head.outputs == tuple(sequence.outputs)
    assert blocks == SendBlocks(7, 1, 3, TAG + 1, tuple(sequence.block_table[4:5]))
    assert sequence.phase is Phase.FROZEN and bench.batch.plan() is None
    assert computed(bench) == [] and sent(bench, 1) == []


def test_after_part_computed_during_a_round_the_migration_goes_on_as_without_split(bench):
    begin(bench, start=8)
    assert computed(bench) == [] and steps(bench, 1) == []
    [(_, head)] = sent(bench, 0)
    assert (head.num_blocks, head.last) == (1, False)
    [(_, head), _] = go(bench)
    assert head.last


def test_rounds_need_not_shrink_while_the_destination_computes(bench):
    begin(bench, start=8)
    for _ in range(12):
        bench.step()
    [(_, head), _] = sent(bench, 0)
    assert (head.num_blocks, head.last) == (3, False)
    for _ in range(16):
        bench.step()
    [(_, head), (_, blocks)] = sent(bench, 1)
    assert (head.num_blocks, head.last, blocks.tag) == (4, False, TAG + 2)


def test_without_tags_for_more_rounds_the_rest_is_sent_after_part_computed(bench):
    sequence, _ = begin(bench, start=8)
    sequence.outgoing.round = ROUNDS - 2
    assert sent(bench, ROUNDS - 2) == [] and steps(bench, 12) == []
    [(_, head)] = computed(bench)
    assert (head.first_block, head.num_blocks, head.tag) == (4, 4, TAG + ROUNDS - 1)
    [(_, head), (_, blocks)] = go(bench)
    assert head.last and len(blocks.block_ids) == 4


def test_a_source_without_room_to_grow_freezes_before_part_computed():
    bench = Bench(num_blocks=5)
    begin(bench, start=8)
    for _ in range(3):
        bench.step()
    [(_, head), _] = sent(bench, 0)
    assert head.last and computed(bench) == []


@pytest.mark.parametrize("order", [Release(7, 1), Unfreeze(7, 1)])
def test_part_computed_after_an_abort_changes_nothing(bench, order):
    begin(bench, start=8)
    sent(bench, 0)
    [(to, _)] = bench.order(order)
    assert to == DATA_PLANE and computed(bench) == []
    sent(bench, 1)
    assert bool(bench.chunks()) == isinstance(order, Unfreeze)


def test_part_computed_of_an_earlier_destination_changes_nothing(bench):
    begin(bench, start=8)
    bench.order(Unfreeze(7, 1))
    bench.order(SendKv(7, 1, 3, 10, 8))
    assert computed(bench, epoch=9) == []
    bench.batch.handle(DATA_PLANE, BlocksSent(7, 1, ROUNDS * 10))
    assert steps(bench, 1) == []
    [(_, head), _] = computed(bench, epoch=10)
    assert head.epoch == 10 and head.last


def test_announced_blocks_are_sent_if_the_sequence_finishes_before_part_computed(bench):
    sequence = bench.assign(7, epoch=1, num_prompt=9, max_tokens=3)
    bench.step()
    bench.order(SendKv(7, 1, 3, 9, 8))
    assert steps(bench, 1) == []
    assert go(bench) == [(DATA_PLANE, SendBlocks(7, 1, 3, TAG, tuple(sequence.block_table[2:])))]
    assert sent(bench, 0) == [] and bench.batch.free_bytes == 200


# --- the destination -----------------------------------------------------------------------------


def announce(bench, which, first, num_blocks, computed, outputs=(), last=False):
    return bench.batch.handle(
        2, KvPayload(7, 9, "layout", first, num_blocks, computed, outputs, (), last, TAG + which)
    )


def arrived(bench, which, reason=""):
    event = BlocksArrived(7, 9, not reason, 0.25, TAG + which, reason)
    return bench.batch.handle(DATA_PLANE, event)


def reserve(bench, num_prompt=17, start=0, outputs=(5,)):
    order = ReceiveKv(
        request(7, num_prompt=num_prompt, max_tokens=100),
        9,
        2,
        len(outputs),
        num_prompt + len(outputs),
        start,
        outputs if start else (),
    )
    return bench.order(order)


def test_the_destination_decodes_once_the_last_round_is_present(bench):
    reserve(bench)
    announce(bench, 0, 0, 4, 17)
    assert arrived(bench, 0) == [] and bench.batch.plan() is None
    announce(bench, 1, 4, 2, 22, tuple(range(6)), last=True)
    [(_, received)] = arrived(bench, 1)
    assert received == KvReceived(7, 9, 1, (1, 2, 3, 4, 5), (), 60, 0.5)
    assert bench.chunks() == [(7, 22, 1, True)]


def test_rounds_may_arrive_in_any_order(bench):
    reserve(bench)
    announce(bench, 0, 0, 4, 17)
    announce(bench, 1, 4, 1, 18, (5, 6), last=True)
    assert arrived(bench, 1) == [] and bench.batch.plan() is None
    [(_, received)] = arrived(bench, 0)
    assert isinstance(received, KvReceived)


def test_the_destination_decodes_once_the_blocks_announced_before_the_freeze_are_present(bench):
    reserve(bench)
    [(_, order)] = announce(bench, 0, 0, 5, 17)
    assert order.block_ids == tuple(bench.batch.sequences[9].block_table)
    assert announce(bench, 0, 5, 0, 18, (5, 6), last=True) == [] and bench.batch.plan() is None
    [(_, received)] = arrived(bench, 0)
    assert received == KvReceived(7, 9, 1, (6,), (), 50, 0.25)
    assert bench.chunks() == [(7, 18, 1, True)]


def test_the_destination_decodes_at_the_last_header_if_all_blocks_are_present(bench):
    reserve(bench)
    announce(bench, 0, 0, 5, 17)
    assert arrived(bench, 0) == [] and bench.batch.plan() is None
    [(_, received)] = announce(bench, 0, 5, 0, 18, (5, 6), last=True)
    assert isinstance(received, KvReceived) and bench.chunks() == [(7, 18, 1, True)]


def test_the_block_table_grows_with_each_header(bench):
    reserve(bench)
    announce(bench, 0, 0, 4, 17)
    [(_, order)] = announce(bench, 1, 4, 3, 29)
    assert order.block_ids == tuple(bench.batch.sequences[9].block_table[4:7])


def test_without_room_for_a_later_round_the_round_is_drained_and_all_blocks_are_freed():
    bench = Bench(num_blocks=5)
    reserve(bench)
    announce(bench, 0, 0, 4, 17)
    assert announce(bench, 1, 4, 3, 29) == [
        (DATA_PLANE, DrainBlocks(2, TAG + 1, 3)),
        (SCHEDULER, KvFailed(7, 9, "no room for what it has grown by")),
    ]
    assert bench.batch.free_bytes == 0
    assert arrived(bench, 0) == [] and bench.batch.free_bytes == 50
    assert announce(bench, 2, 7, 1, 30, last=True) == [(DATA_PLANE, DrainBlocks(2, TAG + 2, 1))]


def test_without_room_for_the_next_token_the_migration_fails():
    """The sequence would be preempted at once; at the source it still has its blocks."""
    bench = Bench(num_blocks=5)
    reserve(bench)
    announce(bench, 0, 0, 4, 17)
    _, (_, failed) = announce(bench, 1, 4, 1, 20, (5, 6, 7, 8), last=True)
    assert failed == KvFailed(7, 9, "no room for what it has grown by")


def test_a_failed_round_fails_the_migration_and_the_other_rounds_are_still_received(bench):
    reserve(bench)
    announce(bench, 0, 0, 4, 17)
    announce(bench, 1, 4, 1, 18, (5, 6), last=True)
    assert arrived(bench, 0, "checksum") == [(SCHEDULER, KvFailed(7, 9, "checksum"))]
    assert bench.batch.free_bytes == 150
    assert arrived(bench, 1) == [] and bench.batch.free_bytes == 200


def test_a_gap_between_rounds_fails_the_migration(bench):
    reserve(bench)
    announce(bench, 0, 0, 3, 13)
    [_, (_, failed)] = announce(bench, 1, 4, 1, 18, (5, 6), last=True)
    assert failed == KvFailed(7, 9, "blocks from 4 on, not from 3")


# --- split ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("computes_last", [True, False])
def test_a_split_decodes_once_both_parts_are_present(computes_last):
    bench = Bench(num_blocks=20, max_num_batched_tokens=8)
    assert reserve(bench, start=12) == [(SCHEDULER, KvReserved(7, 9, 12))]
    [(_, order)] = announce(bench, 0, 3, 2, 18, (5, 6), last=True)
    assert isinstance(order, ReceiveBlocks) and len(order.block_ids) == 2
    assert bench.chunks() == [(7, 0, 8, False)]
    if not computes_last:
        assert bench.chunks() == [(7, 8, 4, False)]
    commands = arrived(bench, 0)
    if computes_last:
        plan = bench.batch.plan()
        commands = bench.batch.commit(plan, StepResult((), ()))
    assert commands == [(SCHEDULER, KvReceived(7, 9, 1, (6,), (), 20, 0.25))]
    assert bench.chunks() == [(7, 18, 1, True)]


def test_a_split_may_compute_outputs_too(bench):
    reserve(bench, num_prompt=5, start=8, outputs=(50, 51, 52, 53))
    announce(bench, 0, 2, 1, 10)
    [chunk] = bench.batch.plan().chunks
    assert chunk.tokens == (0, 1, 2, 3, 4, 50, 51, 52) and chunk.sampling is None


def test_a_split_computes_nothing_before_the_first_header(bench):
    # During a long step no receive could be posted: the two parts would not overlap.
    reserve(bench, start=12)
    assert bench.batch.plan() is None
    announce(bench, 0, 3, 1, 17)
    assert bench.chunks() == [(7, 0, 12, False)]


def test_part_computed_is_sent_once():
    bench = Bench(num_blocks=20, max_num_batched_tokens=8)
    reserve(bench, start=12)
    announce(bench, 0, 3, 1, 17)
    assert go(bench) == [] and go(bench) == [(2, PartComputed(7, 9))]
    assert arrived(bench, 0) == []
    [(_, order)] = announce(bench, 1, 4, 1, 20)
    assert isinstance(order, ReceiveBlocks) and bench.batch.plan() is None


def test_part_computed_is_sent_at_the_first_header_if_the_prefix_is_cached():
    bench = Bench(num_blocks=20, prefix=True)
    bench.assign(1, num_prompt=14, max_tokens=1)
    bench.step()
    assert reserve(bench) == [(SCHEDULER, KvReserved(7, 9, 12))]
    [(_, order), (to, message)] = announce(bench, 0, 3, 1, 17)
    assert isinstance(order, ReceiveBlocks) and (to, message) == (2, PartComputed(7, 9))


def test_no_part_computed_is_sent_to_a_source_that_has_frozen_the_sequence(bench):
    reserve(bench, start=12)
    announce(bench, 0, 3, 2, 18, (5, 6), last=True)
    assert go(bench) == []


def test_a_destination_without_own_part_sends_no_part_computed(bench):
    reserve(bench)
    assert [type(order) for _, order in announce(bench, 0, 0, 4, 17)] == [ReceiveBlocks]


def test_the_part_of_a_split_is_computed_after_all_running_sequences(bench):
    reserve(bench, start=12)
    announce(bench, 0, 3, 1, 17)
    bench.assign(1, num_prompt=9)
    bench.assign(2, num_prompt=3)
    assert [c[0] for c in bench.chunks()] == [1, 2, 7]


def test_cached_blocks_are_neither_sent_nor_computed():
    bench = Bench(num_blocks=20, prefix=True)
    bench.assign(1, num_prompt=10, max_tokens=1)
    bench.step()
    assert reserve(bench) == [(SCHEDULER, KvReserved(7, 9, 8))]
    assert bench.batch.plan() is None
    announce(bench, 0, 2, 3, 18, (5, 6), last=True)
    [(_, received)] = arrived(bench, 0)
    assert received.num_bytes == 30 and bench.chunks() == [(7, 18, 1, True)]


def test_cached_positions_count_if_the_source_has_computed_fewer():
    bench = Bench(num_blocks=20, prefix=True)
    bench.assign(1, num_prompt=14, max_tokens=1)
    bench.step()
    assert reserve(bench) == [(SCHEDULER, KvReserved(7, 9, 12))]
    [(_, received)] = announce(bench, 0, 3, 0, 8, (5,), last=True)
    assert received.num_bytes == 0 and bench.chunks() == [(7, 12, 6, True)]


def test_a_header_that_begins_before_the_split_fails_the_migration(bench):
    reserve(bench, start=12)
    [_, (_, failed)] = bench.batch.handle(2, header(18, (5, 6), epoch=9))
    assert isinstance(failed, KvFailed)
