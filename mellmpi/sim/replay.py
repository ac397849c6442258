"""A trace through one policy, on idealised workers: the real scheduler, and what it achieved."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mellmpi.config import ClusterConfig
from mellmpi.core.cost import CostModel
from mellmpi.core.policies import Policy, policy_for
from mellmpi.protocol import (
    FRONT,
    OBSERVER,
    SCHEDULER,
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
from mellmpi.sim.bound import SAMPLE_S, Load
from mellmpi.sim.ideal import IdealWorkers
from mellmpi.sim.progress import STOP, CountingScheduler, zeros

NO_COST = CostModel(0.0, 0.0, 0.0, float("inf"), 0.0, 0.0)


class Unserved(Exception):
    """Every worker is in use: with more, the policy might have used more."""


@dataclass
class Tally:
    """What one run did."""

    gpus: list[int] = field(default_factory=list)  # at each sample
    used_bytes: list[int] = field(default_factory=list)  # likewise, on the workers
    moves: list[tuple[float, int]] = field(default_factory=list)  # (time, bytes)
    finished: dict[int, int] = field(default_factory=dict)  # request -> step
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


class IdealReplay:
    """One policy on one load. Times are whole decode steps; `tick_s` is how often it looks."""

    def __init__(self, load: Load, name: str, num_workers: int, *, thrift: float, tick_s: float,
                 seed: int, clock: Callable[[], float], may_lack: bool = True):  # fmt: skip
        self.load, self.tally, self.rate = load, Tally(), load.rate
        self.may_lack = may_lack  # requests may wait for want of workers
        self.every = max(1, round(tick_s * load.rate))
        config = ClusterConfig(policy=name, thrift=thrift, seed=seed, park_after_s=0.0,
                               rebalance_every_s=0.0)  # fmt: skip
        policy = timed(policy_for(name, "auto"), self.tally, clock)
        self.scheduler = CountingScheduler(num_workers, config, policy)
        self.scheduler.fleet.view.cost = NO_COST
        kvs = tuple(ModelKv(m, 1, size) for m, size in load.token_bytes.items())
        self.workers = IdealWorkers([kvs] * num_workers, load.capacity, self.rate,
                                    load.outputs.tolist())  # fmt: skip
        self.now = 0.0
        for w, worker in self.workers.workers.items():
            self._tell(w, self.workers.ready(worker))
        for w in range(2, num_workers + 1):  # the policy wakes what it needs
            self.scheduler.fleet.park(w)
        self._route(self.scheduler.fleet.take())
        self.tally.wakes = 0

    def run(self, progress: Callable[[int], None]) -> Tally:
        """All of it, until the last request has ended."""
        load = self.load
        samples, arrivals = deque(load.samples.tolist()), load.arrivals.tolist()
        first, i = arrivals[0], 0
        tick = first + self.every // 2  # between two samples, not just before one
        while i < len(arrivals) or self.scheduler.records:
            near = self.workers.next_step()
            due = [tick, *([near] if near is not None else []), *arrivals[i : i + 1],
                   *([samples[0]] if samples else [])]  # fmt: skip
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
                self._sample()
        while samples:
            samples.popleft()
            self._sample()
        return self.tally

    def _request(self, i: int) -> Request:
        load, prompt = self.load, int(self.load.prompts[i])
        model = load.models[i]
        # What a client would allow, not how long the answer is: nobody knows that yet.
        most = load.capacity // load.token_bytes[model] - prompt
        sampling = Sampling(most, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, (STOP,), None)
        return Request(i, model, zeros(prompt), sampling, None)

    # --- time -----------------------------------------------------------------------------------

    def _advance(self, step: int) -> None:
        self.now = step / self.rate
        self._report(self.workers.advance(step))

    def _progress(self) -> None:
        progress = self.workers.progress(self.scheduler.fleet.view.requests)
        self._route(self.scheduler.advance(progress, self.now))

    def _tick(self) -> None:
        self._progress()
        commands = self.scheduler.tick(self.now)
        self._route(commands)
        if commands and self.scheduler.queue:
            self._report(self.workers.busy)  # who waits may fit by what has been done
        ledger = self.scheduler.fleet.ledger
        if not self.may_lack and ledger.num_requests[1:].all():
            raise Unserved

    def _report(self, workers: Any) -> None:
        for w in sorted(workers):
            if (report := self.workers.report(w)) is not None:
                self._tell(w, report)

    def _tell(self, source: Any, event: Any) -> None:
        self._route(self.scheduler.handle(source, event, self.now))

    def _route(self, commands: list[tuple[Any, Any]]) -> None:
        for destination, command in commands:
            if destination in (FRONT, OBSERVER):
                self._observe(command)
            else:
                assert destination != SCHEDULER
                for source, answer in self.workers.handle(int(destination), command):
                    self._tell(source, answer)

    # --- what is counted ------------------------------------------------------------------------

    def _observe(self, event: Any) -> None:
        tally = self.tally
        match event:
            case Emit():
                if event.finish_reason is not None:
                    tally.finished[event.request_id] = self.workers.step
            case MigrationEnded(outcome="moved"):
                tally.moves.append((self.now, event.num_bytes))
            case Preempted():
                tally.preemptions += 1
            case WorkerChanged(state="waking"):
                tally.wakes += 1
            case Rejected():
                tally.rejected += 1

    def _sample(self) -> None:
        fleet = self.scheduler.fleet
        requests, held = fleet.view.requests, fleet.ledger.num_requests > 0
        homes = requests.home[requests.live & (requests.worker == 0)]
        held[homes[homes > 0]] = True
        self.tally.gpus.append(int(held.sum()))
        self.tally.used_bytes.append(self.workers.all_used())


def figures(load: Load, tally: Tally, wall_s: float) -> dict[str, Any]:
    """The figures of one policy, as the report has them."""
    gpus, used = np.array(tally.gpus), np.array(tally.used_bytes)
    num, moved = len(load.arrivals), sum(size for _, size in tally.moves)
    ends = load.arrivals + load.outputs
    stalls = np.array([(tally.finished[i] - ends[i]) / load.rate for i in tally.finished])
    return {
        "gpus_mean": float(gpus.mean()), "gpus_peak": int(gpus.max()),
        "gpus_over_bound": float(gpus.mean() / load.bound.mean()),
        "utilization": float(used.sum() / max(1, gpus.sum() * load.capacity)),
        "migrations": len(tally.moves), "migrations_per_request": len(tally.moves) / num,
        "migrated_bytes": int(moved),
        "migrated_bytes_per_kv_byte": moved / int(load.final_bytes.sum()),
        "preemptions": tally.preemptions, "finished": len(tally.finished),
        "stall_mean_s": float(stalls.mean()), "stall_p99_s": float(np.percentile(stalls, 99)),
        "wakes": tally.wakes, "decisions": tally.decisions,
        "decisions_per_s": tally.decisions / max(tally.policy_s, 1e-9), "wall_s": wall_s,
    }  # fmt: skip


def sample_times(load: Load) -> np.ndarray:
    """Seconds since the first arrival. float64 [samples]."""
    return np.arange(len(load.samples)) * SAMPLE_S
