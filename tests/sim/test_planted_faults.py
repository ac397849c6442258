"""Breaks one thing at a time and sees the histories notice: else they would prove nothing."""

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
from mellmpi.worker.kv_receiver import Arrivals
from mellmpi.worker.kv_sender import Departures
from mellmpi.worker.kvcache import BlockPool, block_tables
from mellmpi.worker.report_buffer import Unreported
from mellmpi.worker.sequence_table import Holdings
from mellmpi.worker.sequences import Phase, Stream
from tests.core import test_cluster, test_transition_table
from tests.core import test_live_migration as moving
from tests.scheduler.stage import Stage
from tests.sim.histories import check, random_history
from tests.worker.test_batch import Bench

SEEDS = 1000

Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: list[Plant] = []


def fault(plant: Plant) -> Plant:
    FAULTS.append(plant)
    return plant


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_the_histories_catch(plant, monkeypatch):
    plant(monkeypatch)
    assert any(fails(seed) for seed in range(SEEDS)), f"{SEEDS} histories and nobody noticed"


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


# --- too rare, or without consequence for the tokens: a directed test catches them ----------------


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
    stop = Departures.stop

    def hasty(self, sequence):
        stop(self, sequence)
        sequence.closing.clear()

    monkeypatch.setattr(Departures, "stop", hasty)


def the_source_is_not_told_that_the_part_is_computed(monkeypatch):
    monkeypatch.setattr(Arrivals, "_part_computed", lambda self, sequence, arrival: [])


def the_source_does_not_wait_for_the_part(monkeypatch):
    monkeypatch.setattr(Stream, "awaits_part", property(lambda self: False, lambda self, to: None))


def the_word_of_any_destination_will_do(monkeypatch):
    part_computed = Departures.part_computed

    def careless(self, dst_epoch):
        streams = [s.stream for s in self._holdings.sequences.values() if s.stream is not None]
        return part_computed(self, streams[0].dst_epoch if streams else dst_epoch)

    monkeypatch.setattr(Departures, "part_computed", careless)


@pytest.mark.parametrize(
    ("plant", "test"),
    [
        (
            an_unfrozen_sequence_writes_what_is_still_being_sent,
            lambda: (
                moving.test_unfrozen_it_does_not_write_the_half_full_block_that_is_still_being_sent(
                    Bench(num_blocks=20)
                )
            ),
        ),
        (
            the_source_is_not_told_that_the_part_is_computed,
            lambda: moving.test_the_source_is_told_once_that_the_destinations_part_is_computed(),
        ),
        (
            the_source_does_not_wait_for_the_part,
            lambda: moving.test_rounds_need_not_shrink_while_the_destination_computes(
                Bench(num_blocks=20)
            ),
        ),
        (
            the_word_of_any_destination_will_do,
            lambda: moving.test_the_word_of_an_earlier_destination_is_not_that_of_a_later_one(
                Bench(num_blocks=20)
            ),
        ),
    ],
)
def test_a_directed_test_of_moves_catches(plant, test, monkeypatch):
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
            test_cluster.test_what_was_produced_before_a_preemption_is_emitted_not_thrown_away,
        ),
    ],
)
def test_a_directed_test_catches(plant, test, monkeypatch):
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
    latest: dict[Record, int] = {}  # epoch of its last owner

    def count_on(registry, record):
        first = 1000 * (record.request.id + 1)  # workers know epochs only: keep requests apart
        registry._epochs = count((record.epoch or latest.get(record, first)) + 1)

    def reusing_assign(self, record, worker):
        count_on(self.registry, record)
        assign(self, record, worker)
        latest[record] = record.epoch

    def reusing_offer(self, record, move, num_bytes):
        count_on(self.registry, record)
        offer(self, record, move, num_bytes)

    monkeypatch.setattr(Placement, "assign", reusing_assign)
    monkeypatch.setattr(Handover, "offer", reusing_offer)


@fault
def no_suffix_merge(monkeypatch):
    def merge(self, first, tokens):
        self.tokens += tokens
        return tokens

    monkeypatch.setattr(TokenLog, "merge", merge)


def without_release(monkeypatch, name):
    """`Handover.name` does all that it does, but the Release it sends is lost."""
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
    monkeypatch.setattr(Handover, "_thaw", lambda self, record: None)


@fault
def an_offer_is_not_counted(monkeypatch):
    offer = Handover.offer

    def uncounted(self, record, move, num_bytes):
        offer(self, record, move, num_bytes)
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


# --- workers -------------------------------------------------------------------------------------


@fault
def no_token_run_in_kv_received(monkeypatch):
    complete = Arrivals.complete

    def silent(self, sequence):
        return [
            (to, replace(c, tokens=(), logprobs=()) if isinstance(c, KvReceived) else c)
            for to, c in complete(self, sequence)
        ]

    monkeypatch.setattr(Arrivals, "complete", silent)


def freed_early(monkeypatch, touched):
    end = Holdings.end

    def early(self, sequence):
        end(self, sequence)
        if touched(sequence):
            self.tables.pool.give(sequence.block_table)
            sequence.block_table = []

    monkeypatch.setattr(Holdings, "end", early)


@fault
def blocks_are_freed_while_a_send_reads_them(monkeypatch):
    freed_early(monkeypatch, lambda sequence: sequence.sending)


@fault
def blocks_are_freed_while_a_receive_writes_them(monkeypatch):
    freed_early(monkeypatch, lambda sequence: sequence.receiving)


@fault
def a_payload_that_nobody_wants_is_left_on_the_wire(monkeypatch):
    monkeypatch.setattr(Arrivals, "_drain", lambda self, source, header: [])


@fault
def only_first_rounds_are_drained(monkeypatch):
    drain = Arrivals._drain

    def forgetful(self, source, header):
        return [] if header.tag % ROUNDS else drain(self, source, header)

    monkeypatch.setattr(Arrivals, "_drain", forgetful)


@fault
def a_half_full_block_is_sent_as_full_in_an_early_round(monkeypatch):
    send_round = Departures._round

    def hasty(self, sequence, stream, end, last):
        if not last and end == sequence.num_computed // self._holdings.tables.block_size(sequence):
            end = self._holdings.tables.needed(sequence, sequence.num_computed)
        return send_round(self, sequence, stream, end, last)

    monkeypatch.setattr(Departures, "_round", hasty)


@fault
def the_last_round_misses_the_half_full_block(monkeypatch):
    send_round = Departures._round

    def forgetful(self, sequence, stream, end, last):
        if last and stream.round:
            full = sequence.num_computed // self._holdings.tables.block_size(sequence)
            end = max(stream.next_block, full)
        return send_round(self, sequence, stream, end, last)

    monkeypatch.setattr(Departures, "_round", forgetful)


@fault
def what_was_announced_is_not_sent_when_it_is_over(monkeypatch):
    monkeypatch.setattr(Departures, "settle", lambda self: [])
    stepped = Departures.stepped

    def forgetful(self):
        live = self._holdings.sequences
        self._announced = [a for a in self._announced if a[0].epoch in live]
        return stepped(self)

    monkeypatch.setattr(Departures, "stepped", forgetful)


@fault
def who_was_announced_does_not_stop(monkeypatch):
    stepped = Departures.stepped

    def restless(self):
        going = [sequence for sequence, _ in self._announced]
        commands = stepped(self)
        for sequence in going:
            sequence.phase, sequence.closing = Phase.RUNNING, set()
        return commands

    monkeypatch.setattr(Departures, "stepped", restless)


@fault
def a_split_computes_a_block_less_than_is_not_sent(monkeypatch):
    reserve = Arrivals.reserve

    def short(self, order):
        commands = reserve(self, order)
        sequence = self._holdings.sequences.get(order.epoch)
        if sequence is not None and order.start:
            sequence.arrival.start -= self._holdings.tables.block_size(sequence)
        return commands

    monkeypatch.setattr(Arrivals, "reserve", short)


@fault
def a_split_does_not_wait_for_its_own_part(monkeypatch):
    complete = Arrivals.complete

    def hasty(self, sequence):
        if sequence.arrival is not None and sequence.arrival.num_computed is not None:
            sequence.num_computed = max(sequence.num_computed, sequence.arrival.start)
        return complete(self, sequence)

    monkeypatch.setattr(Arrivals, "complete", hasty)


@fault
def the_last_round_does_not_wait_for_those_before(monkeypatch):
    arrived = Arrivals.arrived

    def hasty(self, event):
        sequence = self._holdings.sequences.get(event.epoch)
        if sequence and sequence.arrival.num_computed is not None and event.ok:
            sequence.receiving &= {event.round}
        return arrived(self, event)

    monkeypatch.setattr(Arrivals, "arrived", hasty)


@fault
def a_stream_goes_on_after_the_move_has_failed(monkeypatch):
    def deaf(self, sequence):
        sequence.phase = Phase.RUNNING

    monkeypatch.setattr(Departures, "stop", deaf)


@fault
def what_grew_after_the_reservation_gets_no_blocks(monkeypatch):
    monkeypatch.setattr(Arrivals, "_mismatch", lambda self, sequence, arrival, header: None)


@fault
def logprobs_are_forgotten_once_reported(monkeypatch):
    report = Unreported.report

    def forgetful(self, *args):
        runs = list(self._runs.values())
        message = report(self, *args)
        for sequence in runs:
            sequence.logprobs = {}
        return message

    monkeypatch.setattr(Unreported, "report", forgetful)


@fault
def a_shared_block_is_still_for_the_taking(monkeypatch):
    share = BlockPool.share

    def share_and_keep(self, keys):
        kept = dict(self._kept)
        ids = share(self, keys)
        self._kept.update({block: None for block in ids if block in kept})
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
        return made and replace(made, model=next(iter(self.holdings.fingerprints)))

    monkeypatch.setattr(BatchScheduler, "plan", mixed)


# --- links ---------------------------------------------------------------------------------------


@fault
def links_are_not_fifo(monkeypatch):
    def arrival(self, src, dst, now):
        return now + self.rng.expovariate(1 / self.mean_delay_s)

    monkeypatch.setattr(Network, "arrival", arrival)
