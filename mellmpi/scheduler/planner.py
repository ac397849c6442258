"""How each request moves: its KV is sent, computed again from its tokens, or some of both.

The way that costs least is taken: its seconds, and a fifth of a second for every second without
tokens that it brings, to the request that moves and, while a part of it is computed, to each that
the destination decodes. A request stands still at most as long as it moves: where nobody else does,
the way taken lasts at most a fifth longer than the fastest one.

All moves of one moment are decided together, against what the links and the workers already have
to do. A move for which neither has room within the time limit is deferred: the policy proposes it
again, or something better, at its next look.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mellmpi.costs import Estimates
from mellmpi.protocol import blocks_for

TRANSFER, RECOMPUTE, SPLIT = "transfer", "recompute", "split"
ANY = (TRANSFER, RECOMPUTE, SPLIT)
SHORT_S = 2e-3  # a way that takes no longer is not worth being divided
# What giving up the source's tokens meanwhile must cost at the most, against not doing so; and a
# split, whose two parts get in each other's way more or less, against the better of them.
WORTH = {TRANSFER: 1.0, RECOMPUTE: 0.95, SPLIT: 0.9}
STILL = 0.2  # what a second without a token counts, against a second until a move is over
# Steps of the source and of the destination that a move waits for in all: each takes messages in
# between two of its steps, and after its last blocks have been announced the source makes one more.
TURNS = {TRANSFER: (2.0, 1.0), RECOMPUTE: (0.0, 0.5), SPLIT: (2.0, 1.0)}
PAUSE = {mode: f"pause of {mode}" for mode in ANY}  # what is learnt of it is kept under this name


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that may move, and the ways it may go."""

    src: int
    dst: int
    num_tokens: int
    block_size: int  # tokens
    block_bytes: int
    num_decoding: int  # sequences that the destination decodes meanwhile
    queued_tokens: int  # of prompts that the destination has yet to compute
    modes: Sequence[str] = ANY
    forced: bool = False  # it goes now, in the first of its modes that is possible

    @property
    def num_blocks(self) -> int:
        return blocks_for(self.num_tokens, self.block_size)


@dataclass(frozen=True, slots=True)
class Plan:
    """One way for one request, and what it is expected to take."""

    src: int
    dst: int
    mode: str
    start: int  # positions before it are computed by the destination
    num_bytes: int  # over the link
    work_s: float  # its bytes or its computing alone, whichever is longer
    wait_s: float  # messages and step boundaries alone
    seconds: float  # from the decision to the destination's word, or its first token
    downtime_s: float  # without a token, the first step of the destination included
    last_s: tuple[float, float]  # of these: waiting, and the last round on the link, alone
    others_s: float  # that the requests of the destination stand still, all together
    shared_bytes: int  # of others, that go over the link before it
    in_limit: bool = True

    @property
    def num_prefill(self) -> int:
        return self.start

    @property
    def cost_s(self) -> float:
        return self.seconds + STILL * (self.downtime_s + self.others_s)


@dataclass(slots=True)
class InFlight:
    """What moves under way still ask of links and workers."""

    bytes_between: Counter[tuple[int, int]] = field(default_factory=Counter)  # by pair of hosts
    prefill_at: Counter[int] = field(default_factory=Counter)  # tokens, by worker

    def add(self, hosts: tuple[int, int], dst: int, plan: Plan, sign: int = 1) -> None:
        """A move begins, or (sign -1) has ended."""
        self.bytes_between[hosts] += sign * plan.num_bytes
        self.prefill_at[dst] += sign * plan.num_prefill


def decide(
    candidates: Sequence[Candidate], estimates: Estimates, in_flight: InFlight, limit_s: float
) -> list[Plan | None]:
    """A plan for each candidate, None where it is deferred.

    Greedy: who loses most by not going its best way chooses first; who comes later finds the
    links and workers as busy as the earlier ones have made them.
    """
    busy = InFlight(Counter(in_flight.bytes_between), Counter(in_flight.prefill_at))
    options = [ways(c, estimates, busy, limit_s) for c in candidates]
    plans: list[Plan | None] = [None] * len(candidates)
    for i in sorted(range(len(candidates)), key=lambda i: (-_regret(options[i]), i)):
        candidate = candidates[i]
        plan = _best(candidate, ways(candidate, estimates, busy, limit_s))
        if plan is not None:
            busy.add(estimates.links.hosts(candidate.src, candidate.dst), candidate.dst, plan)
        plans[i] = plan
    return plans


def _regret(options: list[Plan]) -> float:
    """What the second best way costs more."""
    costs = sorted(plan.cost_s for plan in options)
    return costs[1] - costs[0] if len(costs) > 1 else 0.0


def _best(candidate: Candidate, options: list[Plan]) -> Plan | None:
    if candidate.forced:
        return options[0]
    within = [plan for plan in options if plan.in_limit]
    # In this order: what goes on decoding meanwhile, and is simpler, wins unless it costs more.
    best: Plan | None = None
    for plan in sorted(within, key=lambda plan: ANY.index(plan.mode)):
        if best is None or plan.cost_s < WORTH[plan.mode] * best.cost_s:
            best = plan
    return best


def ways(c: Candidate, estimates: Estimates, busy: InFlight, limit_s: float) -> list[Plan]:
    """Every way this request may go, in the order of its modes."""
    plans: list[Plan] = []
    for mode in c.modes:
        start = {TRANSFER: 0, RECOMPUTE: c.num_tokens}.get(mode)
        if start is None:
            if any(plan.work_s < SHORT_S for plan in plans):
                continue
            start = split_at(c, estimates, busy)
            if not start:
                continue
        plans.append(_plan(c, mode, start, estimates, busy, limit_s))
    if not plans:  # nothing to split
        plans.append(_plan(c, TRANSFER, 0, estimates, busy, limit_s))
    return plans


def _plan(
    c: Candidate, mode: str, start: int, estimates: Estimates, busy: InFlight, limit_s: float
) -> Plan:
    sending_s, computing_s = _times(c, start, estimates, busy)
    hosts = estimates.links.hosts(c.src, c.dst)
    work_s, wait_s = max(sending_s, computing_s), _wait_s(c, mode, estimates)
    # What does not fit even where nothing else goes on would never go.
    alone = not (sending_s and busy.bytes_between[hosts]) and not (
        computing_s and busy.prefill_at[c.dst]
    )
    num_bytes = 0
    if mode != RECOMPUTE:
        num_bytes = (c.num_blocks - start // c.block_size) * c.block_bytes
    seconds = estimates.move_s(mode, hosts, wait_s, work_s)
    if mode == SPLIT:  # neither of its parts ends earlier for the other one
        for part, part_s in ((TRANSFER, sending_s), (RECOMPUTE, computing_s)):
            alone_s = estimates.move_s(part, hosts, _wait_s(c, part, estimates), part_s)
            seconds = max(seconds, alone_s)
    last_s = _last_s(c, estimates)
    if mode == RECOMPUTE:  # it, too, ends with a step there, and with word of that
        downtime_s = max(seconds, estimates.move_s(PAUSE[TRANSFER], hosts, *last_s))
    else:
        downtime_s = estimates.move_s(PAUSE[mode], hosts, *last_s)
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
        last_s,
        _others_s(c, start, estimates),
        busy.bytes_between[hosts],
        in_limit=alone or work_s <= limit_s,
    )


def _wait_s(c: Candidate, mode: str, estimates: Estimates) -> float:
    """Until step boundaries; who decodes nothing is there at once."""
    at_src, at_dst = TURNS[mode]
    return estimates.wait_s(c.src, c.dst, (at_src, at_dst if c.num_decoding else 0.0))


def _last_s(c: Candidate, estimates: Estimates) -> tuple[float, float]:
    """Between the last token here and the first there: waiting and a step, and the last blocks."""
    turns = (0.0, 1.5) if c.num_decoding else (1.0, 0.0)  # a step as it was, unless others decode
    last_round_s = estimates.last_round_s(c.src, c.dst, c.block_bytes)
    return estimates.wait_s(c.src, c.dst, turns), last_round_s


def _others_s(c: Candidate, start: int, estimates: Estimates) -> float:
    """What computing so much there costs all whom it decodes meanwhile."""
    if not c.num_decoding:
        return 0.0
    return c.num_decoding * estimates.steps.prompt_s(c.dst, start)


def _times(c: Candidate, start: int, estimates: Estimates, busy: InFlight) -> tuple[float, float]:
    """Seconds of sending blocks from `start` on, and of computing positions before it."""
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

    Whole blocks; the last block always travels. Computing takes longer with every block and
    sending less: where they cross, by bisection.
    """
    low, high = 0, (c.num_tokens - 1) // c.block_size
    if not high:
        return 0
    while low < high:  # the most blocks for which computing does not take longer than sending
        middle = (low + high + 1) // 2
        sending_s, computing_s = _times(c, middle * c.block_size, estimates, busy)
        low, high = (middle, high) if computing_s <= sending_s else (low, middle - 1)
    most = (c.num_tokens - 1) // c.block_size
    near = {max(1, low), min(most, low + 1)}
    best = min(near, key=lambda b: max(_times(c, b * c.block_size, estimates, busy)))
    return best * c.block_size
