"""The choice of a mode for each move, and the shared load on links and workers."""

from dataclasses import replace

import pytest

from mellmpi.costs import CostModel, Estimates
from mellmpi.costs.estimates import MESSAGES_S
from mellmpi.protocol import LinksMeasured
from mellmpi.scheduler import RECOMPUTE, InFlight
from mellmpi.scheduler.planner import (
    DOWNTIME_WEIGHT,
    MAX_COST_RATIO,
    PAUSE,
    SPLIT,
    TRANSFER,
    Candidate,
    decide,
    plans_for,
    split_at,
)
from tests.scheduler.stage import report

# A block of 16 tokens is 160 bytes; computing it takes 16 ms, and sending it 16 s / `ratio`.
MOVE = Candidate(
    src=1, dst=2, num_tokens=1000, block_size=16, block_bytes=160, num_decoding=0, queued_tokens=0
)
LIMIT_S = 10.0


def estimates(Bps: float = 10_000.0, prefill_token_s: float = 1e-3) -> Estimates:
    # Next to no cost of steps and of attention: times are round.
    cost = CostModel(prefill_token_s, 1e-12, 1e-12, Bps, 0.0, 0.0)
    found = Estimates(cost)
    found.steps._prior[3] = 1e-15
    return found


def stepping(found: Estimates, **steps_s: float) -> Estimates:
    """Let workers w1, w2 … report steps of these durations, seconds."""
    for worker, step_s in steps_s.items():
        found.steps.add(int(worker[1:]), replace(report(), steps=4, step_s=4 * step_s))
    return found


def decided(candidate=MOVE, in_flight=None, **kwargs):
    [plan] = decide([candidate], estimates(**kwargs), in_flight or InFlight(), LIMIT_S)
    return plan


def test_over_a_fast_link_the_kv_is_transferred():
    assert decided(Bps=1e6).mode == TRANSFER


def test_over_a_slow_link_the_kv_is_recomputed():
    assert decided(Bps=100.0).mode == RECOMPUTE


def test_if_both_modes_take_equally_long_a_split_in_the_middle_takes_half():
    plan = decided(Bps=10_000.0)
    assert plan.mode == SPLIT
    assert plan.start % 16 == 0 and abs(plan.start - 500) <= 16
    assert plan.seconds - MESSAGES_S == pytest.approx(0.5, rel=0.03)
    assert plan.num_bytes == (63 - plan.start // 16) * 160


@pytest.mark.parametrize("Bps", [3_000.0, 6_000.0, 10_000.0, 15_000.0, 40_000.0])
def test_the_boundary_of_a_split_is_the_best_one(Bps):
    found, busy = estimates(Bps), InFlight()

    def seconds(blocks):
        sending_s = (63 - blocks) * 160 / Bps
        return max(sending_s, blocks * 16e-3)

    best = min(range(1, 63), key=seconds)
    assert seconds(split_at(MOVE, found, busy) // 16) == pytest.approx(seconds(best))


def test_a_very_short_move_is_not_split():
    assert decided(Bps=10_000.0 * 1000, prefill_token_s=1e-6).mode == TRANSFER
    assert decided(Bps=10_000.0 * 200, prefill_token_s=5e-6).mode == SPLIT


def test_a_request_of_one_block_cannot_be_split():
    assert split_at(replace(MOVE, num_tokens=16), estimates(), InFlight()) == 0
    small = replace(MOVE, num_tokens=16, modes=(SPLIT,), forced=True)
    assert decided(small).mode == TRANSFER


def test_the_last_block_of_a_split_is_sent():
    plan = decided(replace(MOVE, modes=(SPLIT,), forced=True), prefill_token_s=1e-9)
    assert plan.start == 62 * 16 and plan.num_bytes == 160


def test_a_forced_mode_is_used_regardless_of_its_duration():
    slow = replace(MOVE, modes=(TRANSFER,), forced=True)
    busy = InFlight()
    busy.bytes_between[0, 0] = 10**9
    assert decided(slow, busy, Bps=1.0).mode == TRANSFER


@pytest.mark.parametrize("mode", [TRANSFER, RECOMPUTE])
def test_only_possible_modes_are_chosen(mode):
    fast = {"Bps": 1e9} if mode == RECOMPUTE else {"Bps": 1e-3, "prefill_token_s": 1e-9}
    assert decided(replace(MOVE, modes=(mode,)), **fast).mode == mode


def test_a_transfer_may_take_about_a_fifth_longer_than_a_recompute():
    possible = replace(MOVE, modes=(TRANSFER, RECOMPUTE))
    assert decided(possible, Bps=8_500.0).mode == TRANSFER  # 1.19 s rather than 1.00
    assert decided(possible, Bps=7_500.0).mode == RECOMPUTE  # 1.34 s


@pytest.mark.parametrize("Bps", [100 * 1.3**i for i in range(26)])
def test_on_an_idle_destination_the_chosen_mode_is_not_much_slower_than_the_fastest(Bps):
    plans = plans_for(MOVE, estimates(Bps), InFlight(), LIMIT_S)
    options = {plan.mode: plan.seconds for plan in plans}
    chosen = decided(Bps=Bps)
    bound = (1 + DOWNTIME_WEIGHT) / MAX_COST_RATIO[RECOMPUTE] * (1 + 1e-9)
    assert options[chosen.mode] <= bound * min(options.values())


def test_a_split_that_saves_little_is_not_chosen():
    both = replace(MOVE, modes=(TRANSFER, SPLIT))
    assert decided(both, Bps=10_000 * 14.0).mode == TRANSFER  # a fifteenth less
    assert decided(both, Bps=10_000 * 6.0).mode == SPLIT  # a seventh less


def test_delays_of_the_destinations_requests_count_against_recomputing():
    possible = replace(MOVE, modes=(TRANSFER, RECOMPUTE))
    assert decided(possible, Bps=5_000.0).mode == RECOMPUTE  # 2 s rather than 1
    beside = replace(possible, num_decoding=8)
    assert decided(beside, Bps=5_000.0).mode == TRANSFER
    assert decided(beside, Bps=2_000.0).mode == RECOMPUTE


def test_a_split_is_not_expected_to_take_less_than_either_of_its_parts():
    found, both = estimates(1e6), replace(MOVE, modes=(TRANSFER, SPLIT))
    for _ in range(20):
        found.record_move(SPLIT, (0, 0), 0.003, 1.0, 0.4)
    _, split = plans_for(both, found, InFlight(), LIMIT_S)
    assert split.seconds >= found.move_s(TRANSFER, (0, 0), MESSAGES_S, split.work_s)
    assert decide([both], found, InFlight(), LIMIT_S)[0].mode == TRANSFER


def test_a_transfer_waits_for_steps_of_both_workers_and_a_recompute_for_half_a_step():
    found = stepping(estimates(1e6), w1=0.03, w2=0.1)
    sent, computed = plans_for(
        replace(MOVE, modes=(TRANSFER, RECOMPUTE), num_decoding=1), found, InFlight(), LIMIT_S
    )
    assert sent.seconds - sent.work_s == pytest.approx(MESSAGES_S + 2 * 0.03 + 0.1)
    assert computed.seconds - computed.work_s == pytest.approx(MESSAGES_S + 0.1 / 2)


def test_an_idle_destination_adds_no_wait():
    found = stepping(estimates(1e6), w2=0.1)
    [sent] = plans_for(replace(MOVE, modes=(TRANSFER,)), found, InFlight(), LIMIT_S)
    assert sent.seconds - sent.work_s == pytest.approx(MESSAGES_S)


def test_migrations_in_flight_count_as_load_of_link_and_worker():
    busy = InFlight()
    busy.bytes_between[0, 0] = 60_000
    assert decided(replace(MOVE, modes=(TRANSFER, RECOMPUTE)), busy, Bps=50_000.0).mode == RECOMPUTE
    busy = InFlight()
    busy.prefill_at[2] = 5_000
    assert decided(replace(MOVE, modes=(TRANSFER, RECOMPUTE)), busy, Bps=5_000.0).mode == TRANSFER


def test_moves_planned_together_share_links_and_workers():
    plans = decide([MOVE] * 4, estimates(10_000.0), InFlight(), LIMIT_S)
    sent = sum(plan.num_bytes for plan in plans)
    computed = sum(plan.num_prefill for plan in plans)
    # 4,000 tokens, 40,320 bytes: link and worker finish within a fifth of each other.
    assert sent / 10_000.0 == pytest.approx(computed * 1e-3, rel=0.2)


def test_a_move_that_fits_neither_link_nor_worker_is_deferred():
    plans = decide([MOVE] * 60, estimates(10_000.0), InFlight(), LIMIT_S)
    taken = [plan for plan in plans if plan is not None]
    assert 15 < len(taken) < 25  # 10 s of 10,000 bytes and of 1,000 tokens
    assert all(plan.seconds <= LIMIT_S + MESSAGES_S for plan in taken)


def test_without_other_load_the_time_limit_does_not_apply():
    assert decided(Bps=1.0, prefill_token_s=1.0).mode == SPLIT
    busy = InFlight()
    busy.bytes_between[0, 0], busy.prefill_at[2] = 1, 1
    assert decided(in_flight=busy, Bps=1.0, prefill_token_s=1.0) is None


def test_the_move_with_the_largest_regret_chooses_first():
    # The link has time for one of them; the large one gains more from it.
    small, large = replace(MOVE, num_tokens=320), MOVE
    only = (TRANSFER, RECOMPUTE)
    plans = decide(
        [replace(small, modes=only), replace(large, modes=only)],
        estimates(50_000.0),
        InFlight(),
        0.22,
    )
    assert plans[1] is not None and plans[1].mode == TRANSFER


def test_links_of_other_hosts_are_not_shared():
    found = estimates()
    found.links.measured(LinksMeasured((0, 1, 2), (0, 0), (1, 2), (0.0, 0.0), (1e5, 1e5)))
    busy = InFlight()
    busy.bytes_between[0, 1] = 10**6
    [there] = plans_for(replace(MOVE, modes=(TRANSFER,)), found, busy, LIMIT_S)
    [elsewhere] = plans_for(replace(MOVE, dst=3, modes=(TRANSFER,)), found, busy, LIMIT_S)
    assert there.seconds > 10 > 1 > elsewhere.seconds and not there.in_limit


def test_a_link_that_slows_down_ten_times_changes_decisions_within_three_migrations():
    found = estimates(100_000.0, prefill_token_s=5e-4)
    found.links.measured(LinksMeasured((0, 0), (0,), (0,), (0.0,), (100_000.0,)))
    modes = []
    for _ in range(4):
        [plan] = decide([replace(MOVE, modes=(TRANSFER, RECOMPUTE))], found, InFlight(), LIMIT_S)
        modes.append(plan.mode)
        found.links.record_transfer(1, 2, 10_080, 1.2, 0.0)
    assert modes[0] == TRANSFER and modes[3] == RECOMPUTE


def test_downtime_is_two_blocks_and_a_step_or_the_whole_duration_of_a_recompute():
    found, modes = stepping(estimates(), w1=0.03, w2=0.1), (TRANSFER, RECOMPUTE, SPLIT)
    sent, computed, split = plans_for(replace(MOVE, modes=modes), found, InFlight(), 9.0)
    assert sent.downtime_s == split.downtime_s == pytest.approx(MESSAGES_S + 0.03 + 320 / 10_000)
    assert computed.downtime_s == computed.seconds
    [sent] = plans_for(replace(MOVE, modes=(TRANSFER,), num_decoding=3), found, InFlight(), 9.0)
    # Half a step until the destination's next step begins, and that step.
    assert sent.downtime_s == pytest.approx(MESSAGES_S + 0.15 + 320 / 10_000)


def test_the_downtime_of_a_recompute_is_at_least_that_of_a_transfer():
    found = estimates(10.0, prefill_token_s=1e-6)
    for _ in range(20):
        [sent] = plans_for(replace(MOVE, modes=(TRANSFER,)), found, InFlight(), LIMIT_S)
        found.record_move(PAUSE[TRANSFER], (0, 0), *sent.pause_parts_s, 40.0)
    modes = (TRANSFER, RECOMPUTE)
    sent, computed = plans_for(replace(MOVE, modes=modes), found, InFlight(), LIMIT_S)
    assert computed.seconds < 1.0 and computed.downtime_s == sent.downtime_s > 30.0


def test_downtime_is_learnt_for_each_mode():
    found, modes = stepping(estimates(), w1=0.03), (TRANSFER, SPLIT)
    for _ in range(20):
        [split] = plans_for(replace(MOVE, modes=(SPLIT,)), found, InFlight(), LIMIT_S)
        found.record_move(PAUSE[SPLIT], (0, 0), *split.pause_parts_s, 0.2)
    sent, split = plans_for(replace(MOVE, modes=modes), found, InFlight(), LIMIT_S)
    assert split.downtime_s == pytest.approx(0.2, rel=0.1)
    assert sent.downtime_s == pytest.approx(MESSAGES_S + 0.03 + 320 / 10_000)


def test_overhead_is_learnt_for_each_mode_and_changes_the_choice():
    found = estimates(10_000.0)
    for _ in range(20):
        [plan] = plans_for(replace(MOVE, modes=(SPLIT,)), found, InFlight(), LIMIT_S)
        # Computing and receiving slow each other down.
        found.record_move(SPLIT, (0, 0), plan.wait_s, plan.work_s, 1.1)
    [split] = plans_for(replace(MOVE, modes=(SPLIT,)), found, InFlight(), LIMIT_S)
    assert split.seconds == pytest.approx(1.1, rel=0.1)
    [plan] = decide([MOVE], found, InFlight(), LIMIT_S)
    assert plan.mode == TRANSFER and plan.seconds == pytest.approx(plan.work_s + MESSAGES_S)


def test_a_move_that_has_ended_is_no_load():
    busy = InFlight()
    [plan] = plans_for(replace(MOVE, modes=(SPLIT,)), estimates(), InFlight(), 9.0)
    busy.add((0, 0), 2, plan)
    assert busy.bytes_between[0, 0] == plan.num_bytes and busy.prefill_at[2] == plan.start
    busy.add((0, 0), 2, plan, -1)
    assert not any(busy.bytes_between.values()) and not any(busy.prefill_at.values())
