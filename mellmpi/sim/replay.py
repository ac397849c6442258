"""A trace through one policy, on idealised workers: the real scheduler, and what it achieved."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mellmpi.config import ClusterConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import (
    FRONT,
    OBSERVER,
    Emit,
    MigrationEnded,
    ModelKv,
    Preempted,
    Rejected,
    Request,
    Sampling,
    Submit,
    WorkerChanged,
)
from mellmpi.scheduler.policies import Policy, policy_for
from mellmpi.sim.bound import SAMPLE_S, Load
from mellmpi.sim.ideal import IdealWorkers
from mellmpi.sim.progress import STOP, CountingScheduler, zeros

NO_COST = CostModel(0.0, 0.0, 0.0, float("inf"), 0.0, 0.0)


@dataclass(frozen=True)
class Settings:
    """How a load is replayed."""

    thrift: float
    tick_s: float  # the policy looks at the whole cluster
    seed: int
    clock: Callable[[], float]  # for the time that the policy itself takes
    may_lack: bool = True  # requests may wait for want of workers
    park_after_s: float = 1.0  # a worker empty for so long may be parked


class Unserved(Exception):
    """Every worker is in use: with more, the policy might have used more."""


@dataclass
class Tally:
    """What one run did."""

    gpus: list[int] = field(default_factory=list)  # at each sample
    used_bytes: list[int] = field(default_factory=list)  # likewise, on the workers
    moves: list[tuple[float, int]] = field(default_factory=list)  # (time, bytes)
    finished: dict[int, float] = field(default_factory=dict)  # request -> step, or second
    stall_s: dict[int, float] = field(default_factory=dict)  # request -> see `figures`
    ttft_s: dict[int, float] = field(default_factory=dict)  # request -> arrival to first token
    tpot_s: dict[int, float] = field(default_factory=dict)  # request -> a token after the first
    rejected: int = 0
    preemptions: int = 0
    wakes: int = 0
    decisions: int = 0
    policy_s: float = 0.0


def timed(policy: Policy, tally: Tally, clock: Callable[[], float]) -> Policy:
    """The same policy; its calls are counted, and the time in them."""

    def watch(decide: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            began = clock()
            answer = decide(*arguments)
            tally.policy_s += clock() - began
            tally.decisions += 1
            return answer

        return watched

    return replace(policy, place=watch(policy.place), rebalance=watch(policy.rebalance))


class Replay:
    """One policy on one load; how time passes on the workers is for a subclass to say."""

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
        """All of it, until the last request has ended; `progress` hears how many have arrived."""
        raise NotImplementedError

    def _request(self, i: int) -> Request:
        kv, prompt = self._kv[self.load.models[i]], int(self.load.prompts[i])
        # What a client would allow, not how long the answer is: nobody knows that yet.
        most = self.load.capacity // kv.block_bytes * kv.block_size - prompt
        sampling = Sampling(most, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, (STOP,), None)
        return Request(i, kv.model, zeros(prompt), sampling, None)

    def _sleep(self) -> list[tuple[Any, Any]]:
        """Park all workers but the first; the policy wakes what it wants."""
        registry = self.scheduler.registry
        for w in range(2, len(registry.ledger.state)):
            registry.park(w)
        return registry.take()

    def _check_enough(self) -> None:
        if not self.settings.may_lack and self.scheduler.registry.ledger.num_requests[1:].all():
            raise Unserved

    def _observe(self, event: Any, now: float) -> None:
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
        homes = requests.home[requests.live & (requests.worker == 0)]
        held[homes[homes > 0]] = True
        self.tally.gpus.append(int(held.sum()))
        self.tally.used_bytes.append(used_bytes)


class IdealReplay(Replay):
    """Times are whole decode steps; prefill, waking and moves take none."""

    def __init__(self, load: Load, name: str, hosts: list[tuple[ModelKv, ...]], settings: Settings):
        super().__init__(load, name, hosts, NO_COST, replace(settings, park_after_s=0.0))
        self.rate, self.now = load.rate, 0.0
        self.every = max(1, round(settings.tick_s * load.rate))
        self.workers = IdealWorkers(hosts, load.capacity, self.rate, load.outputs.tolist())
        for w, worker in self.workers.workers.items():
            self._tell(w, self.workers.ready(worker))
        self._route(self._sleep())
        self.tally.wakes = 0

    def run(self, progress: Callable[[int], None]) -> Tally:
        """All of it, until the last request has ended."""
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
                    self._tell(FRONT, Submit(self._request(i)))
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
            self._report(self.workers.busy)  # who waits may fit by what has been done
        self._check_enough()

    def _report(self, workers: Any) -> None:
        for w in sorted(workers):
            if (report := self.workers.report(w)) is not None:
                self._tell(w, report)

    def _tell(self, source: Any, event: Any) -> None:
        self._route(self.scheduler.handle(source, event, self.now))

    def _route(self, commands: list[tuple[Any, Any]]) -> None:
        for destination, command in commands:
            if destination in (FRONT, OBSERVER):
                if isinstance(command, Emit) and command.finish_reason is not None:
                    self._finished(command.request_id)
                self._observe(command, self.now)
            else:
                for source, answer in self.workers.handle(int(destination), command):
                    self._tell(source, answer)


def figures(load: Load, tally: Tally, wall_s: float) -> dict[str, Any]:
    """The figures of one policy, as the report has them.

    gpus_*        that hold a request, running or preempted; sampled from the first to the last
                  arrival every `SAMPLE_S`, as `gpus_over_bound` (mean over mean bound) is
    utilization   KV bytes in use on all workers over the capacity of those GPUs
    migrations    that came to their end; bytes are those on the link, none for recompute
    stall         of each request, the time on no worker (queued, or preempted and until its KV is
                  computed again) and frozen while it is sent; mean and 99th percentile
    decisions     calls of the policy, per second of time spent in it
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
    """Where things take time: arrival to first token, and a token after the first."""
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
    """Seconds since the first arrival. float64 [samples]."""
    return np.arange(len(load.samples)) * SAMPLE_S
