"""Replays a load with one policy: the real cluster scheduler on simulated workers."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

import numpy as np

from mellmpi.config import ClusterConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import (
    FRONT,
    GREEDY,
    Address,
    Emit,
    FrontEvent,
    MigrationEnded,
    ModelKv,
    Observation,
    Preempted,
    Rejected,
    Request,
    SchedulerEvent,
    Submit,
    WorkerChanged,
    WorkerCommand,
)
from mellmpi.scheduler import Commands
from mellmpi.scheduler.policies import Policy, policy_for
from mellmpi.sim.bound import SAMPLE_S, Load
from mellmpi.sim.ideal import IdealWorkers
from mellmpi.sim.progress import STOP, CountingScheduler, zeros

P = ParamSpec("P")
R = TypeVar("R")
NO_COST = CostModel(0.0, 0.0, 0.0, float("inf"), 0.0, 0.0)


@dataclass(frozen=True)
class Settings:
    """Settings of a replay."""

    thrift: float
    tick_s: float  # between two calls of `rebalance`
    seed: int
    clock: Callable[[], float]  # to measure the time spent in the policy
    may_lack: bool = True  # requests may wait because there are too few workers
    park_after_s: float = 1.0  # a worker that is empty for this time may be parked


class Unserved(Exception):
    """All workers hold requests: with more workers the policy might use more."""


@dataclass
class Tally:
    """The results of one run."""

    gpus: list[int] = field(default_factory=list)  # at each sample
    used_bytes: list[int] = field(default_factory=list)  # at each sample, on all workers
    moves: list[tuple[float, int]] = field(default_factory=list)  # (time, bytes)
    finished: dict[int, float] = field(default_factory=dict)  # request -> step (ideal) or second
    stall_s: dict[int, float] = field(default_factory=dict)  # request -> see `figures`
    ttft_s: dict[int, float] = field(default_factory=dict)  # request -> arrival to first token
    tpot_s: dict[int, float] = field(default_factory=dict)  # request -> mean after the first token
    rejected: int = 0
    preemptions: int = 0
    wakes: int = 0
    decisions: int = 0  # calls of the policy
    policy_s: float = 0.0  # time in them


def timed(policy: Policy, tally: Tally, clock: Callable[[], float]) -> Policy:
    """Return the policy with its calls counted and timed in the tally."""

    def measured(decide: Callable[P, R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            began = clock()
            decision = decide(*args, **kwargs)
            tally.policy_s += clock() - began
            tally.decisions += 1
            return decision

        return call

    return replace(policy, place=measured(policy.place), rebalance=measured(policy.rebalance))


class Replay:
    """Base class: one policy on one load. Subclasses simulate the workers and the time."""

    def __init__(
        self,
        load: Load,
        name: str,
        hosts: list[tuple[ModelKv, ...]],
        cost: CostModel,
        settings: Settings,
    ):
        self.load, self.tally, self.settings = load, Tally(), settings
        config = ClusterConfig(
            policy=name,
            thrift=settings.thrift,
            seed=settings.seed,
            park_after_s=settings.park_after_s,
            rebalance_every_s=0.0,
        )
        policy = timed(policy_for(name, "auto"), self.tally, settings.clock)
        self.scheduler = CountingScheduler(len(hosts), config, policy)
        self.scheduler.registry.view.cost = cost
        self._kv = {kv.model: kv for kvs in hosts for kv in kvs}

    def run(self, progress: Callable[[int], None]) -> Tally:
        """Replay until the last request has ended. Calls `progress` with the number of arrivals."""
        raise NotImplementedError

    def _request(self, i: int) -> Request:
        kv, prompt = self._kv[self.load.models[i]], int(self.load.prompts[i])
        # The limit that a client would set; the length of the answer is not known in advance.
        most = self.load.capacity // kv.block_bytes * kv.block_size - prompt
        sampling = replace(GREEDY, max_tokens=most, stop_token_ids=(STOP,))
        return Request(i, kv.model, zeros(prompt), sampling, None, 0, None)

    def _park_all(self) -> Commands:
        """Park all workers but the first. Returns the commands; the policy wakes workers."""
        registry = self.scheduler.registry
        for w in range(2, len(registry.ledger.state)):
            registry.park(w)
        return registry.take()

    def _check_enough(self) -> None:
        if not self.settings.may_lack and self.scheduler.registry.ledger.num_requests[1:].all():
            raise Unserved

    def _observe(self, event: FrontEvent | Observation, now: float) -> None:
        tally = self.tally
        match event:
            case MigrationEnded(outcome="moved"):
                tally.moves.append((now, event.num_bytes))
            case Preempted():
                tally.preemptions += 1
            case WorkerChanged(state="waking"):
                tally.wakes += 1
            case Rejected():
                tally.rejected += 1

    def _sample(self, used_bytes: int) -> None:
        registry = self.scheduler.registry
        requests, held = registry.view.requests, registry.ledger.num_requests > 0
        pinned_to = requests.pinned_to[requests.live & (requests.worker == 0)]
        held[pinned_to[pinned_to > 0]] = True
        self.tally.gpus.append(int(held.sum()))
        self.tally.used_bytes.append(used_bytes)


class IdealReplay(Replay):
    """Replay on the idealised cluster: prefill, waking and migrations take no time."""

    def __init__(self, load: Load, name: str, hosts: list[tuple[ModelKv, ...]], settings: Settings):
        super().__init__(load, name, hosts, NO_COST, replace(settings, park_after_s=0.0))
        self.rate, self.now = load.rate, 0.0
        self.every = max(1, round(settings.tick_s * load.rate))
        self.workers = IdealWorkers(hosts, load.capacity, self.rate, load.outputs.tolist())
        for w, worker in self.workers.workers.items():
            self._to_scheduler(w, self.workers.ready(worker))
        self._route(self._park_all())
        self.tally.wakes = 0

    def run(self, progress: Callable[[int], None]) -> Tally:
        """Replay until the last request has ended."""
        load = self.load
        samples, arrivals = deque(load.samples.tolist()), load.arrivals.tolist()
        first, i = arrivals[0], 0
        tick = first + self.every // 2  # between two samples, not just before one
        while i < len(arrivals) or self.scheduler.records:
            near = self.workers.next_step()
            due = [
                tick,
                *([near] if near is not None else []),
                *arrivals[i : i + 1],
                *([samples[0]] if samples else []),
            ]
            step = min(due)
            self._advance(step)
            if i < len(arrivals) and arrivals[i] == step:
                self._progress()
                while i < len(arrivals) and arrivals[i] == step:
                    self._to_scheduler(FRONT, Submit(self._request(i)))
                    i += 1
                progress(i)
            if tick == step:
                self._tick()
                tick += self.every
            if samples and samples[0] == step:
                samples.popleft()
                self._sample(self.workers.all_used())
        while samples:
            samples.popleft()
            self._sample(self.workers.all_used())
        return self.tally

    def _finished(self, i: int) -> None:
        load, step = self.load, self.workers.step
        self.tally.finished[i] = step
        self.tally.stall_s[i] = (step - int(load.arrivals[i] + load.outputs[i])) / load.rate

    # --- time -----------------------------------------------------------------------------------

    def _advance(self, step: int) -> None:
        self.now = step / self.rate
        self._report(self.workers.advance(step))

    def _progress(self) -> None:
        progress = self.workers.progress(self.scheduler.registry.view.requests)
        self._route(self.scheduler.advance(progress, self.now))

    def _tick(self) -> None:
        self._progress()
        commands = self.scheduler.tick(self.now)
        self._route(commands)
        if commands and self.scheduler.queue:
            self._report(self.workers.busy)  # a waiting request may fit now
        self._check_enough()

    def _report(self, workers: Iterable[int]) -> None:
        for w in sorted(workers):
            if (report := self.workers.report(w)) is not None:
                self._to_scheduler(w, report)

    def _to_scheduler(self, source: Address, event: SchedulerEvent) -> None:
        self._route(self.scheduler.handle(source, event, self.now))

    def _route(self, commands: Commands) -> None:
        for destination, command in commands:
            if isinstance(command, WorkerCommand):
                for source, answer in self.workers.handle(int(destination), command):
                    self._to_scheduler(source, answer)
            else:
                if isinstance(command, Emit) and command.finish_reason is not None:
                    self._finished(command.request_id)
                self._observe(command, self.now)


def figures(load: Load, tally: Tally, wall_s: float) -> dict[str, float]:
    """Return the figures of one policy, as in the report.

    gpus_*        GPUs that hold a request, running or preempted, sampled every `SAMPLE_S` from the
                  first to the last arrival; `gpus_over_bound` is their mean over the mean bound
    utilization   KV bytes in use on all workers over the capacity of those GPUs
    migrations    completed ones; bytes are those sent over links, none for recompute
    stall         time of a request on no worker (queued, or preempted until its KV is recomputed)
                  and frozen during its migration; mean and 99th percentile over requests
    decisions     calls of the policy; `decisions_per_s` is per second spent in the policy
    """
    gpus, used = np.array(tally.gpus), np.array(tally.used_bytes)
    num, moved = len(load.arrivals), sum(size for _, size in tally.moves)
    stalls = np.array([tally.stall_s[i] for i in tally.finished])
    return {
        "gpus_mean": float(gpus.mean()),
        "gpus_peak": int(gpus.max()),
        "gpus_over_bound": float(gpus.mean() / load.bound.mean()),
        "utilization": float(used.sum() / max(1, gpus.sum() * load.capacity)),
        "migrations": len(tally.moves),
        "migrations_per_request": len(tally.moves) / num,
        "migrated_bytes": int(moved),
        "migrated_bytes_per_kv_byte": moved / int(load.final_bytes.sum()),
        "preemptions": tally.preemptions,
        "finished": len(tally.finished),
        "stall_mean_s": float(stalls.mean()),
        "stall_p99_s": float(np.percentile(stalls, 99)),
        "wakes": tally.wakes,
        "decisions": tally.decisions,
        "decisions_per_s": tally.decisions / max(tally.policy_s, 1e-9),
        "policy_s": tally.policy_s,
        "wall_s": wall_s,
    } | _latencies(tally)


def _latencies(tally: Tally) -> dict[str, float]:
    """Return TTFT and TPOT, if the replay measures them."""
    if not tally.ttft_s:
        return {}
    ttft_s, tpot_s = (list(values.values()) for values in (tally.ttft_s, tally.tpot_s))
    return {
        "ttft_mean_s": float(np.mean(ttft_s)),
        "ttft_p99_s": float(np.percentile(ttft_s, 99)),
        "tpot_mean_s": float(np.mean(tpot_s)),
        "tpot_p99_s": float(np.percentile(tpot_s, 99)),
    }


def sample_times(load: Load) -> np.ndarray:
    """Sample times in seconds since the first arrival. float64 [samples]."""
    return np.arange(len(load.samples)) * SAMPLE_S
