"""A simulated worker: the loop of the real one, on simulated time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.costs import UNKNOWN, StepSeconds
from mellmpi.protocol import (
    Address,
    HostedModel,
    ModelKv,
    StepPlan,
    StepReport,
    Stop,
    Wake,
    WorkerEvent,
    WorkerReady,
)
from mellmpi.sim.executor import HashExecutor
from mellmpi.worker import BatchScheduler, Outbox


@dataclass(frozen=True)
class WorkerSpec:
    """Properties of a simulated worker."""

    models: tuple[ModelKv, ...]  # blocks of equal bytes
    num_blocks: int
    batch: BatchConfig
    cache: CacheConfig
    wake_s: float
    executor: Callable[[int, Sequence[ModelKv]], HashExecutor] = HashExecutor  # of (blocks, models)
    step_s: StepSeconds = UNKNOWN  # step times it plans with; unknown: only tokens limit steps


@dataclass
class SimWorker:
    """A batch scheduler, an executor, and the messages that arrived during a step."""

    id: int
    spec: WorkerSpec
    acked: int = 0
    alive: bool = True
    plan: StepPlan | None = None  # the current step
    inbox: list[tuple[Address, WorkerEvent | Stop]] = field(default_factory=list)
    unreported_steps: int = 0
    unreported_s: float = 0.0

    def __post_init__(self) -> None:
        self.wake()

    def wake(self) -> WorkerReady:
        """Create executor and batch scheduler. Returns the announcement to the scheduler."""
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

    def handle(self, source: Address, message: WorkerEvent | Stop) -> Outbox:
        """Handle one message. Returns the messages to send."""
        if isinstance(message, Stop | Wake):
            self.acked = self.batch.acked = self.batch.acked + 1
            return []
        outbox = self.batch.handle(source, message)
        self.acked = self.batch.acked
        return outbox

    def finish_step(self, step_s: float) -> Outbox:
        """Execute and commit `plan`, a step of `step_s`. Returns the messages to send."""
        assert self.plan is not None
        outbox = self.batch.commit(self.plan, self.executor.execute(self.plan))
        self.plan = None
        self.unreported_steps += 1
        self.unreported_s += step_s
        return outbox

    def report(self) -> StepReport | None:
        """Return the report of the steps since the last one, or None if there is no news."""
        report = self.batch.report(self.unreported_steps, self.unreported_s)
        if report is not None:
            self.unreported_steps, self.unreported_s = 0, 0.0
        return report
