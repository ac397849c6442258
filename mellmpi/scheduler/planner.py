"""Chooses the mode of each migration: transfer of the KV, recompute from the tokens, or a split.

The mode with the least cost is chosen, where

    cost_s = seconds + DOWNTIME_WEIGHT · (downtime_s + others_delay_s)

and the last term adds up the delays of all requests that the destination decodes. A request pauses
for at most the duration of its migration, so that on an idle destination the chosen mode takes at
most about a fifth longer than the fastest one.

All moves of a round are planned together, against the load that migrations in flight and queued
prompts already put on links and workers. A move without a mode within the time limit is deferred;
the policy may propose it again in its next round.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mellmpi.costs import Estimates
from mellmpi.protocol import blocks_for

TRANSFER, RECOMPUTE, SPLIT = "transfer", "recompute", "split"
ALL_MODES = (TRANSFER, RECOMPUTE, SPLIT)
MIN_SPLIT_S = 2e-3  # a migration whose work takes less in another mode is not split
# A mode is chosen over those before it in ALL_MODES if it costs less than this share of their best:
# a recompute ends decoding at the source, and the two parts of a split slow each other down.
MAX_COST_RATIO = {TRANSFER: 1.0, RECOMPUTE: 0.95, SPLIT: 0.9}
DOWNTIME_WEIGHT = 0.2  # of a second without a token, relative to a second of migration
# Steps of (source, destination) that a migration waits for: each handles messages between two
# steps, and the source makes one more step after it has announced its last blocks.
STEPS_WAITED = {TRANSFER: (2.0, 1.0), RECOMPUTE: (0.0, 0.5), SPLIT: (2.0, 1.0)}
PAUSE = {mode: f"pause of {mode}" for mode in ALL_MODES}  # keys of the estimates of downtime


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that may move, and the modes that are possible."""

    src: int
    dst: int
    num_tokens: int
    block_size: int  # tokens
    block_bytes: int
    num_decoding: int  # sequences that the destination decodes
    queued_tokens: int  # prompt tokens that the destination has not computed yet
    modes: Sequence[str] = ALL_MODES
    forced: bool = False  # start now, in the first of the modes that is possible

    @property
    def num_blocks(self) -> int:
        return blocks_for(self.num_tokens, self.block_size)


@dataclass(frozen=True, slots=True)
class Plan:
    """A migration of one request in one mode, with its expected duration and load."""

    src: int
    dst: int
    mode: str
    start: int  # positions before it are computed by the destination
    num_bytes: int  # over the link
    work_s: float  # the longer of its transfer and its computation, behind the current load
    wait_s: float  # for messages and step boundaries
    seconds: float  # from the decision to the destination's answer or first token
    downtime_s: float  # without a token, including the first step of the destination
    pause_parts_s: tuple[float, float]  # of the downtime: waiting, and the last round on the link
    others_delay_s: float  # delays of the requests that the destination decodes, summed
    shared_bytes: int  # of other migrations, before it on the link
    in_limit: bool = True

    @property
    def num_prefill(self) -> int:
        """Positions that the destination computes."""
        return self.start

    @property
    def cost_s(self) -> float:
        return self.seconds + DOWNTIME_WEIGHT * (self.downtime_s + self.others_delay_s)


@dataclass(slots=True)
class InFlight:
    """Load of the current migrations on links and workers."""

    bytes_between: Counter[tuple[int, int]] = field(default_factory=Counter)  # by pair of hosts
    prefill_at: Counter[int] = field(default_factory=Counter)  # tokens, by worker

    def add(self, hosts: tuple[int, int], dst: int, plan: Plan, sign: int = 1) -> None:
        """Add a migration that starts, or (sign -1) remove one that has ended."""
        self.bytes_between[hosts] += sign * plan.num_bytes
        self.prefill_at[dst] += sign * plan.num_prefill


def decide(
    candidates: Sequence[Candidate], estimates: Estimates, in_flight: InFlight, limit_s: float
) -> list[Plan | None]:
    """Return a plan for each candidate; None: deferred.

    Greedy by regret: the candidate with the largest cost difference between its two best modes
    chooses first, and its load counts for later candidates. `limit_s` bounds `Plan.work_s`.
    """
    busy = InFlight(Counter(in_flight.bytes_between), Counter(in_flight.prefill_at))
    options = [plans_for(c, estimates, busy, limit_s) for c in candidates]
    plans: list[Plan | None] = [None] * len(candidates)
    for i in sorted(range(len(candidates)), key=lambda i: (-_regret(options[i]), i)):
        candidate = candidates[i]
        plan = _best(candidate, plans_for(candidate, estimates, busy, limit_s))
        if plan is not None:
            busy.add(estimates.links.hosts(candidate.src, candidate.dst), candidate.dst, plan)
        plans[i] = plan
    return plans


def _regret(options: list[Plan]) -> float:
    """Cost of the second best plan minus cost of the best one, seconds; 0 with one plan."""
    costs = sorted(plan.cost_s for plan in options)
    return costs[1] - costs[0] if len(costs) > 1 else 0.0


def _best(candidate: Candidate, options: list[Plan]) -> Plan | None:
    if candidate.forced:
        return options[0]
    within = [plan for plan in options if plan.in_limit]
    best: Plan | None = None
    for plan in sorted(within, key=lambda plan: ALL_MODES.index(plan.mode)):
        if best is None or plan.cost_s < MAX_COST_RATIO[plan.mode] * best.cost_s:
            best = plan
    return best


def plans_for(c: Candidate, estimates: Estimates, busy: InFlight, limit_s: float) -> list[Plan]:
    """A plan for each possible mode of the candidate, in the order of its modes; at least one."""
    plans: list[Plan] = []
    for mode in c.modes:
        start = {TRANSFER: 0, RECOMPUTE: c.num_tokens}.get(mode)
        if start is None:
            if any(plan.work_s < MIN_SPLIT_S for plan in plans):
                continue
            start = split_at(c, estimates, busy)
            if not start:
                continue
        plans.append(_plan(c, mode, start, estimates, busy, limit_s))
    if not plans:  # a split was the only mode, and it has one block
        plans.append(_plan(c, TRANSFER, 0, estimates, busy, limit_s))
    return plans


def _plan(
    c: Candidate, mode: str, start: int, estimates: Estimates, busy: InFlight, limit_s: float
) -> Plan:
    sending_s, computing_s = _times(c, start, estimates, busy)
    hosts = estimates.links.hosts(c.src, c.dst)
    work_s, wait_s = max(sending_s, computing_s), _wait_s(c, mode, estimates)
    # Without other load the limit does not apply: the move would be deferred forever.
    alone = not (sending_s and busy.bytes_between[hosts]) and not (
        computing_s and busy.prefill_at[c.dst]
    )
    num_bytes = 0
    if mode != RECOMPUTE:
        num_bytes = (c.num_blocks - start // c.block_size) * c.block_bytes
    seconds = estimates.move_s(mode, hosts, wait_s, work_s)
    if mode == SPLIT:  # neither part ends earlier than it would alone
        for part, part_s in ((TRANSFER, sending_s), (RECOMPUTE, computing_s)):
            alone_s = estimates.move_s(part, hosts, _wait_s(c, part, estimates), part_s)
            seconds = max(seconds, alone_s)
    pause_parts_s = _pause_parts_s(c, estimates)
    if mode == RECOMPUTE:  # it also ends with a step of the destination and a report
        downtime_s = max(seconds, estimates.move_s(PAUSE[TRANSFER], hosts, *pause_parts_s))
    else:
        downtime_s = estimates.move_s(PAUSE[mode], hosts, *pause_parts_s)
    return Plan(
        c.src,
        c.dst,
        mode,
        start,
        num_bytes,
        work_s,
        wait_s,
        seconds,
        downtime_s,
        pause_parts_s,
        _others_delay_s(c, start, estimates),
        busy.bytes_between[hosts],
        in_limit=alone or work_s <= limit_s,
    )


def _wait_s(c: Candidate, mode: str, estimates: Estimates) -> float:
    """Seconds of messages and of step boundaries; a destination that decodes nothing is idle."""
    at_src, at_dst = STEPS_WAITED[mode]
    return estimates.wait_s(c.src, c.dst, (at_src, at_dst if c.num_decoding else 0.0))


def _pause_parts_s(c: Candidate, estimates: Estimates) -> tuple[float, float]:
    """Seconds between the last token at the source and the first one at the destination.

    Returns (messages and steps, transfer of the last blocks). The first step of an idle destination
    is taken to last as long as a step of the source.
    """
    num_steps = (0.0, 1.5) if c.num_decoding else (1.0, 0.0)
    last_round_s = estimates.last_round_s(c.src, c.dst, c.block_bytes)
    return estimates.wait_s(c.src, c.dst, num_steps), last_round_s


def _others_delay_s(c: Candidate, start: int, estimates: Estimates) -> float:
    """Summed delays of the destination's requests while it computes `start` positions, seconds."""
    if not c.num_decoding:
        return 0.0
    return c.num_decoding * estimates.steps.prompt_s(c.dst, start)


def _times(c: Candidate, start: int, estimates: Estimates, busy: InFlight) -> tuple[float, float]:
    """Seconds of (sending blocks from `start` on, computing positions before it)."""
    hosts = estimates.links.hosts(c.src, c.dst)
    num_bytes = max(0, c.num_blocks - start // c.block_size) * c.block_bytes
    sending_s = computing_s = 0.0
    if start < c.num_tokens:
        link = estimates.links.between(c.src, c.dst)
        sending_s = link.transfer_s(num_bytes + busy.bytes_between[hosts])
    if start:
        before = busy.prefill_at[c.dst] + c.queued_tokens
        computing_s = estimates.prefill_s(c.dst, start, before, c.num_decoding)
    return sending_s, computing_s


def split_at(c: Candidate, estimates: Estimates, busy: InFlight) -> int:
    """Positions to compute while the others arrive, so that both end together; 0: no split.

    Whole blocks; the last block is always sent. By bisection: with every block computed instead of
    sent, computing takes longer and sending takes less.
    """
    low, high = 0, (c.num_tokens - 1) // c.block_size
    if not high:
        return 0
    while low < high:  # find the most blocks for which computing takes no longer than sending
        middle = (low + high + 1) // 2
        sending_s, computing_s = _times(c, middle * c.block_size, estimates, busy)
        low, high = (middle, high) if computing_s <= sending_s else (low, middle - 1)
    most = (c.num_tokens - 1) // c.block_size
    near = {max(1, low), min(most, low + 1)}
    best = min(near, key=lambda b: max(_times(c, b * c.block_size, estimates, busy)))
    return best * c.block_size
