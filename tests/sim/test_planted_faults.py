"""Injects one fault at a time: the histories must detect it, else they would prove nothing."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest

from mellmpi.protocol import ROUNDS, KvReceived, Release
from mellmpi.scheduler import ClusterScheduler, Ledger
from mellmpi.scheduler.migration import Handover
from mellmpi.scheduler.placement import Placement
from mellmpi.scheduler.requests import Record, TokenLog
from mellmpi.sim import Network
from mellmpi.worker import BatchScheduler
from mellmpi.worker.kv_receiver import KvReceiver
from mellmpi.worker.kv_sender import KvSender
from mellmpi.worker.kvcache import BlockPool, BlockTables, block_tables
from mellmpi.worker.report_buffer import ReportBuffer
from mellmpi.worker.sequence_table import SequenceTable
from mellmpi.worker.sequences import OutgoingKv, Phase
from tests.scheduler import test_cluster, test_transition_table
from tests.scheduler.stage import Stage
from tests.sim.histories import check, random_history
from tests.worker import test_live_migration as migrations
from tests.worker.test_batch import Bench

SEEDS = 1000

Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: list[Plant] = []


def fault(plant: Plant) -> Plant:
    FAULTS.append(plant)
    return plant


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_the_histories_detect_the_fault(plant, monkeypatch):
    plant(monkeypatch)
    assert any(fails(seed) for seed in range(SEEDS)), f"{SEEDS} histories did not detect it"


def fails(seed: int) -> bool:
    sim, requests = random_history(seed)
    sim.max_events = 30_000
    try:
        check(sim, requests)
    except Exception:
        return True
    return False


def test_without_a_fault_the_same_histories_pass():
    assert not any(fails(seed) for seed in range(10))


# --- too rare, or without effect on tokens: a directed test detects them -------------------------


def no_epoch_check_of_tokens(monkeypatch):
    report = ClusterScheduler._report

    def careless(self, worker, event):
        ids = event.request_ids
        owned = tuple(self.records[i].epoch if i in self.records else 0 for i in ids)
        report(self, worker, replace(event, epochs=owned))

    monkeypatch.setattr(ClusterScheduler, "_report", careless)


def no_epoch_check_of_preemptions(monkeypatch):
    report = ClusterScheduler._report

    def careless(self, worker, event):
        ids = [i for i, _ in event.preempted if i in self.records]
        report(self, worker, replace(event, preempted=[(i, self.records[i].epoch) for i in ids]))

    monkeypatch.setattr(ClusterScheduler, "_report", careless)


def preemptions_are_handled_before_the_tokens_of_the_same_report(monkeypatch):
    report = ClusterScheduler._report

    def hasty(self, worker, event):
        runs = {"request_ids": (), "epochs": (), "firsts": (), "counts": (), "tokens": ()}
        report(self, worker, replace(event, **runs))
        report(self, worker, replace(event, preempted=()))

    monkeypatch.setattr(ClusterScheduler, "_report", hasty)


def an_unfrozen_sequence_writes_what_is_still_being_sent(monkeypatch):
    abort = KvSender.abort

    def hasty(self, sequence):
        abort(self, sequence)
        sequence.sending_partial.clear()

    monkeypatch.setattr(KvSender, "abort", hasty)


def the_source_does_not_receive_part_computed(monkeypatch):
    monkeypatch.setattr(KvReceiver, "_part_computed", lambda self, sequence, incoming: [])


def the_source_does_not_wait_for_the_part(monkeypatch):
    monkeypatch.setattr(
        OutgoingKv, "awaits_part", property(lambda self: False, lambda self, to: None)
    )


def part_computed_of_any_destination_is_accepted(monkeypatch):
    part_computed = KvSender.part_computed

    def careless(self, dst_epoch):
        outgoing = [s.outgoing for s in self._table.sequences.values() if s.outgoing is not None]
        return part_computed(self, outgoing[0].dst_epoch if outgoing else dst_epoch)

    monkeypatch.setattr(KvSender, "part_computed", careless)


@pytest.mark.parametrize(
    ("plant", "test"),
    [
        (
            an_unfrozen_sequence_writes_what_is_still_being_sent,
            lambda: (
                migrations.test_an_unfrozen_sequence_does_not_write_the_half_full_block_in_transfer(
                    Bench(num_blocks=20)
                )
            ),
        ),
        (
            the_source_does_not_receive_part_computed,
            lambda: migrations.test_part_computed_is_sent_once(),
        ),
        (
            the_source_does_not_wait_for_the_part,
            lambda: migrations.test_rounds_need_not_shrink_while_the_destination_computes(
                Bench(num_blocks=20)
            ),
        ),
        (
            part_computed_of_any_destination_is_accepted,
            lambda: migrations.test_part_computed_of_an_earlier_destination_changes_nothing(
                Bench(num_blocks=20)
            ),
        ),
    ],
)
def test_a_directed_test_of_migrations_detects_the_fault(plant, test, monkeypatch):
    test()
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        test()


@pytest.mark.parametrize(
    ("plant", "test"),
    [
        (
            no_epoch_check_of_tokens,
            test_transition_table.test_a_run_under_a_stale_epoch_is_dropped,
        ),
        (
            no_epoch_check_of_preemptions,
            test_transition_table.test_a_preemption_under_a_stale_epoch_is_dropped,
        ),
        (
            preemptions_are_handled_before_the_tokens_of_the_same_report,
            test_cluster.test_tokens_computed_before_a_preemption_are_emitted,
        ),
    ],
)
def test_a_directed_test_detects_the_fault(plant, test, monkeypatch):
    test(Stage())
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        test(Stage())


# --- rank 0 --------------------------------------------------------------------------------------


@fault
def no_epoch_check_of_answers(monkeypatch):
    answer = Handover.answer

    def careless(self, record, source, event):
        epoch = record.offer.epoch if record.offer else 0
        return answer(self, record, source, replace(event, epoch=epoch))

    monkeypatch.setattr(Handover, "answer", careless)


@fault
def an_epoch_is_reused_as_e_plus_1(monkeypatch):
    assign, offer = Placement.assign, Handover.offer
    latest: dict[Record, int] = {}  # epoch of the last owner

    def count_on(registry, record):
        first = 1000 * (record.request.id + 1)  # epochs of different requests must differ
        registry._epochs = count((record.epoch or latest.get(record, first)) + 1)

    def reusing_assign(self, record, worker):
        count_on(self.registry, record)
        assign(self, record, worker)
        latest[record] = record.epoch

    def reusing_offer(self, record, *args):
        count_on(self.registry, record)
        offer(self, record, *args)

    monkeypatch.setattr(Placement, "assign", reusing_assign)
    monkeypatch.setattr(Handover, "offer", reusing_offer)


@fault
def no_suffix_merge(monkeypatch):
    def merge(self, first, tokens):
        self.tokens += tokens
        return tokens

    monkeypatch.setattr(TokenLog, "merge", merge)


def without_release(monkeypatch, name):
    """Drop the Release that `Handover.name` sends."""
    method = getattr(Handover, name)

    def forgetful(self, *args):
        before = len(self.registry.out)
        method(self, *args)
        new = self.registry.out[before:]
        self.registry.out[before:] = [c for c in new if not isinstance(c[1], Release)]

    monkeypatch.setattr(Handover, name, forgetful)


@fault
def the_source_is_not_released(monkeypatch):
    without_release(monkeypatch, "_received")


@fault
def the_destination_is_not_released(monkeypatch):
    without_release(monkeypatch, "withdraw")


@fault
def no_unfreeze(monkeypatch):
    monkeypatch.setattr(Handover, "_unfreeze", lambda self, record: None)


@fault
def an_offer_is_not_counted(monkeypatch):
    offer = Handover.offer

    def uncounted(self, record, move, *args):
        offer(self, record, move, *args)
        self.registry.ledger.num_requests[move.dst] -= 1

    monkeypatch.setattr(Handover, "offer", uncounted)


@fault
def a_request_goes_where_its_model_is_not(monkeypatch):
    able = Ledger.able
    monkeypatch.setattr(Ledger, "able", lambda self, model: able(self, model) | (self.capacity > 0))


@fault
def an_order_is_never_acknowledged(monkeypatch):
    report = Ledger.report

    def deaf(self, worker, acked, free_bytes):
        report(self, worker, 0, free_bytes)

    monkeypatch.setattr(Ledger, "report", deaf)


@fault
def requests_stay_pinned_to_a_held_worker(monkeypatch):
    monkeypatch.setattr(Placement, "unpin", lambda self, worker: None)


# --- workers -------------------------------------------------------------------------------------


@fault
def no_token_run_in_kv_received(monkeypatch):
    complete = KvReceiver.activate_if_complete

    def silent(self, sequence):
        return [
            (to, replace(c, tokens=(), logprobs=()) if isinstance(c, KvReceived) else c)
            for to, c in complete(self, sequence)
        ]

    monkeypatch.setattr(KvReceiver, "activate_if_complete", silent)


def freed_early(monkeypatch, touched):
    end = SequenceTable.end

    def early(self, sequence):
        end(self, sequence)
        if touched(sequence):
            self.tables.pool.free(sequence.block_table)
            sequence.block_table = []

    monkeypatch.setattr(SequenceTable, "end", early)


@fault
def blocks_are_freed_while_a_send_reads_them(monkeypatch):
    freed_early(monkeypatch, lambda sequence: sequence.sending)


@fault
def blocks_are_freed_while_a_receive_writes_them(monkeypatch):
    freed_early(monkeypatch, lambda sequence: sequence.receiving)


@fault
def blocks_of_an_ended_sequence_are_not_received(monkeypatch):
    monkeypatch.setattr(KvReceiver, "_drain", lambda self, source, header: [])


@fault
def only_first_rounds_are_drained(monkeypatch):
    drain = KvReceiver._drain

    def forgetful(self, source, header):
        return [] if header.tag % ROUNDS else drain(self, source, header)

    monkeypatch.setattr(KvReceiver, "_drain", forgetful)


@fault
def a_half_full_block_is_sent_as_full_in_an_early_round(monkeypatch):
    send_round = KvSender._round

    def hasty(self, sequence, outgoing, end, last):
        if not last and end == sequence.num_computed // self._table.tables.block_size(sequence):
            end = self._table.tables.blocks_needed(sequence, sequence.num_computed)
        return send_round(self, sequence, outgoing, end, last)

    monkeypatch.setattr(KvSender, "_round", hasty)


@fault
def the_last_round_misses_the_half_full_block(monkeypatch):
    send_round = KvSender._round

    def forgetful(self, sequence, outgoing, end, last):
        if last and outgoing.round:
            full = sequence.num_computed // self._table.tables.block_size(sequence)
            end = max(outgoing.next_block, full)
        return send_round(self, sequence, outgoing, end, last)

    monkeypatch.setattr(KvSender, "_round", forgetful)


@fault
def announced_blocks_of_an_aborted_migration_are_not_sent(monkeypatch):
    monkeypatch.setattr(KvSender, "send_aborted", lambda self: [])
    after_step = KvSender.after_step

    def forgetful(self):
        live = self._table.sequences
        self._announced = [a for a in self._announced if a[0].epoch in live]
        return after_step(self)

    monkeypatch.setattr(KvSender, "after_step", forgetful)


@fault
def an_announced_sequence_does_not_freeze(monkeypatch):
    after_step = KvSender.after_step

    def restless(self):
        freezing = [sequence for sequence, _ in self._announced]
        commands = after_step(self)
        for sequence in freezing:
            sequence.phase, sequence.sending_partial = Phase.RUNNING, set()
        return commands

    monkeypatch.setattr(KvSender, "after_step", restless)


@fault
def a_split_computes_a_block_less_than_is_not_sent(monkeypatch):
    reserve = KvReceiver.reserve

    def short(self, order):
        commands = reserve(self, order)
        sequence = self._table.sequences.get(order.epoch)
        if sequence is not None and order.start:
            sequence.incoming.start -= self._table.tables.block_size(sequence)
        return commands

    monkeypatch.setattr(KvReceiver, "reserve", short)


@fault
def a_split_does_not_wait_for_its_own_part(monkeypatch):
    complete = KvReceiver.activate_if_complete

    def hasty(self, sequence):
        if sequence.incoming is not None and sequence.incoming.num_computed is not None:
            sequence.num_computed = max(sequence.num_computed, sequence.incoming.start)
        return complete(self, sequence)

    monkeypatch.setattr(KvReceiver, "activate_if_complete", hasty)


@fault
def the_last_round_does_not_wait_for_those_before(monkeypatch):
    arrived = KvReceiver.blocks_arrived

    def hasty(self, event):
        sequence = self._table.sequences.get(event.epoch)
        if sequence and sequence.incoming.num_computed is not None and event.ok:
            sequence.receiving &= {event.round}
        return arrived(self, event)

    monkeypatch.setattr(KvReceiver, "blocks_arrived", hasty)


@fault
def rounds_go_on_after_the_migration_has_failed(monkeypatch):
    def deaf(self, sequence):
        sequence.phase = Phase.RUNNING

    monkeypatch.setattr(KvSender, "abort", deaf)


@fault
def a_sequence_grown_after_its_reservation_gets_no_blocks(monkeypatch):
    monkeypatch.setattr(KvReceiver, "_mismatch", lambda self, sequence, incoming, header: None)


@fault
def logprobs_are_forgotten_once_reported(monkeypatch):
    report = ReportBuffer.report

    def forgetful(self, *args):
        runs = list(self._runs.values())
        message = report(self, *args)
        for sequence in runs:
            sequence.logprobs = {}
        return message

    monkeypatch.setattr(ReportBuffer, "report", forgetful)


@fault
def a_request_moves_without_the_logprobs_of_its_prompt(monkeypatch):
    monkeypatch.setattr(Record, "awaits_prompt_logprobs", property(lambda self: False))


@fault
def logprobs_of_a_prompt_are_reported_with_every_run(monkeypatch):
    report = ReportBuffer.report

    def repeating(self, *args):
        found = {s: s.prompt_logprobs for s in self._runs.values()}
        message = report(self, *args)
        for sequence, logprobs in found.items():
            sequence.prompt_logprobs = logprobs
        return message

    monkeypatch.setattr(ReportBuffer, "report", repeating)


@fault
def a_resumed_request_is_scored_again(monkeypatch):
    assign = BatchScheduler._assign

    def scoring(self, order):
        assign(self, order)
        sequence = self.sequences.get(order.epoch)
        if sequence and order.request.sampling.num_prompt_logprobs is not None:
            sequence.prompt_logprobs = []

    monkeypatch.setattr(BatchScheduler, "_assign", scoring)


@fault
def positions_of_a_cached_prefix_are_not_scored(monkeypatch):
    grow = BlockTables.grow

    def sharing(self, sequence, num_tokens):
        if sequence.prompt_logprobs == [] and not sequence.block_table:
            self.reuse_prefix(sequence)
        return grow(self, sequence, num_tokens)

    monkeypatch.setattr(BlockTables, "grow", sharing)


@fault
def a_shared_block_can_still_be_allocated(monkeypatch):
    share = BlockPool.share

    def share_and_keep(self, keys):
        cached = dict(self._cached)
        ids = share(self, keys)
        self._cached.update({block: None for block in ids if block in cached})
        return ids

    monkeypatch.setattr(BlockPool, "share", share_and_keep)


@fault
def models_share_the_blocks_of_equal_beginnings(monkeypatch):
    monkeypatch.setattr(block_tables, "root_key", lambda model: b"")


@fault
def a_step_mixes_models(monkeypatch):
    plan = BatchScheduler.plan

    def mixed(self):
        made = plan(self)
        return made and replace(made, model=next(iter(self.table.fingerprints)))

    monkeypatch.setattr(BatchScheduler, "plan", mixed)


# --- links ---------------------------------------------------------------------------------------


@fault
def links_are_not_fifo(monkeypatch):
    def arrival(self, src, dst, now):
        return now + self.rng.expovariate(1 / self.mean_delay_s)

    monkeypatch.setattr(Network, "arrival", arrival)
