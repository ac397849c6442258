"""One simulated worker: the loop of the real one, on simulated time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.costs import UNKNOWN, StepSeconds
from mellmpi.protocol import Address, HostedModel, ModelKv, StepPlan, Stop, Wake, WorkerReady
from mellmpi.sim.executor import HashExecutor
from mellmpi.worker import BatchScheduler


@dataclass(frozen=True)
class WorkerSpec:
    """What a simulated worker is like."""

    models: tuple[ModelKv, ...]  # blocks of equal bytes
    num_blocks: int
    batch: BatchConfig
    cache: CacheConfig
    wake_s: float
    executor: Callable[[int, Sequence[ModelKv]], HashExecutor] = HashExecutor  # of (blocks, models)
    step_s: StepSeconds = UNKNOWN  # what it believes of its steps; unknown: only tokens limit them


@dataclass
class SimWorker:
    """A batch scheduler, an arena, and the messages that came during a step."""

    id: int
    spec: WorkerSpec
    acked: int = 0
    alive: bool = True
    plan: StepPlan | None = None  # the step under way
    inbox: list[tuple[Address, Any]] = field(default_factory=list)
    unreported_steps: int = 0
    unreported_s: float = 0.0

    def __post_init__(self) -> None:
        self.wake()

    def wake(self) -> WorkerReady:
        """Arena and batch scheduler anew; the announcement of it."""
        spec = self.spec
        hosted = tuple(HostedModel(kv, f"simulated {kv.model}") for kv in spec.models)
        self.batch = BatchScheduler(hosted, spec.num_blocks, self.acked, spec.batch, spec.cache)
        self.batch.step_seconds = spec.step_s
        self.executor = spec.executor(spec.num_blocks, spec.models)
        capacity = spec.num_blocks * self.batch.block_bytes
        return WorkerReady(
            spec.models,
            capacity,
            spec.batch.max_num_seqs,
            self.acked,
            spec.wake_s,
            spec.batch.max_num_batched_tokens,
            spec.batch.target_step_s,
            spec.step_s if any(spec.step_s) else (),
            "",
        )

    def handle(self, source: Address, message: Any) -> list[tuple[Address, Any]]:
        """One message; what it makes the worker send."""
        if isinstance(message, Stop | Wake):
            self.acked = self.batch.acked = self.batch.acked + 1
            return []
        commands = self.batch.handle(source, message)
        self.acked = self.batch.acked
        return commands

    def finish_step(self, step_s: float) -> list[tuple[Address, Any]]:
        """The pass of `plan` is over: take its tokens in; what it makes the worker send."""
        assert self.plan is not None
        commands = self.batch.commit(self.plan, self.executor.execute(self.plan))
        self.plan = None
        self.unreported_steps += 1
        self.unreported_s += step_s
        return commands

    def report(self) -> Any:
        """The report of the steps since the last one, or None."""
        report = self.batch.report(self.unreported_steps, self.unreported_s)
        if report is not None:
            self.unreported_steps, self.unreported_s = 0, 0.0
        return report
