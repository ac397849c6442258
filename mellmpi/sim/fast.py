"""A worker that simulates many steps at once: a BatchScheduler that can skip identical steps.

Until a request ends, needs prefill or overflows, or a message arrives, all steps are identical,
and the result of several steps is a sum. A property test compares it with single steps.
"""

from collections.abc import Sequence

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import HostedModel, StepPlan, StepResult, WorkerReady
from mellmpi.sim.executor import SilentExecutor
from mellmpi.sim.progress import STOP, zeros
from mellmpi.sim.worker import SimWorker, WorkerSpec
from mellmpi.worker import BatchScheduler, Outbox
from mellmpi.worker import Sequence as LiveSequence


class CountingExecutor(SilentExecutor):
    """Answers of given lengths: zeros, then a stop token. It has no arena."""

    def __init__(self, lengths: Sequence[int]):
        self._lengths = lengths  # by request id

    def execute(self, plan: StepPlan) -> StepResult:
        """Return one token per sampled chunk, in plan order."""
        sampled = [c for c in plan.chunks if c.sampling is not None]
        lengths = [(len(c.history[1]) + 1, self._lengths[c.request_id]) for c in sampled]
        return StepResult(
            tuple([STOP if n >= m else 0 for n, m in lengths]), (None,) * len(sampled)
        )


class FastBatch(BatchScheduler):
    """A batch scheduler that can repeat a step without planning it again."""

    def __init__(
        self,
        models: tuple[HostedModel, ...],
        num_blocks: int,
        acked: int,
        batch: BatchConfig,
        cache: CacheConfig,
        lengths: Sequence[int],
    ):
        super().__init__(models, num_blocks, acked, batch, cache)
        self._lengths = lengths  # of the answers, by request id
        self._has_preempted = False  # while planning the current step

    def plan(self) -> StepPlan | None:
        """Return the next forward pass, or None if there is nothing to compute."""
        self._has_preempted = False
        return super().plan()

    def _preempt(self, sequence: LiveSequence) -> None:
        self._has_preempted = True  # reported after this step
        super()._preempt(sequence)

    def num_identical(self) -> int:
        """Return the number of identical steps, including the planned one, if no message comes."""
        planned = self._planned
        if self._sender.has_announced:
            return 1
        computable = [s for s in self.sequences.values() if s.computable]
        left_out = len(computable) - len(planned)
        if self._has_preempted or (left_out and len(planned) < self._limits.max_num_seqs):
            return 1
        if left_out and len({s.request.model for s in computable}) > 1:
            return 1
        if any(s.incoming is not None or s.num_tokens - s.num_computed > 1 for s in planned):
            return 1
        return self._steps_with_room(min(self._tokens_left(s) for s in planned))

    def _tokens_left(self, sequence: LiveSequence) -> int:
        length = min(self._lengths[sequence.request.id], sequence.request.sampling.max_tokens)
        return length - len(sequence.outputs)

    def _steps_with_room(self, most: int) -> int:
        """Return the largest number of steps, 1 to `most`, for which enough blocks are free."""
        least, free = 1, self.pool.num_free
        while least < most:
            middle = (least + most + 1) // 2
            more = sum(
                max(0, self.tables.blocks_needed(s, s.num_tokens + middle - 1) - len(s.block_table))
                for s in self._planned
            )
            least, most = (middle, most) if more <= free else (least, middle - 1)
        return least

    def skip(self, steps: int) -> None:
        """Apply the planned step and identical ones, `steps` in all; the next one is planned."""
        for sequence in self._planned:
            sequence.num_computed += steps
            sequence.outputs += zeros(steps)
            self._reports.decoded(sequence, steps)
            grown = self.tables.grow(sequence, sequence.num_tokens)
            assert grown, f"request {sequence.request.id} was given a step without room"


class FastWorker(SimWorker):
    """A simulated worker that can skip all but the last of several identical steps."""

    batch: FastBatch

    def __init__(self, id: int, spec: WorkerSpec, cost: CostModel, lengths: Sequence[int]):
        self.cost, self.lengths = cost, lengths
        self.steps_left, self.one_step_s = 0, 0.0  # identical steps, including the current one
        super().__init__(id, spec)

    def wake(self) -> WorkerReady:
        """Create executor and batch scheduler. Returns the announcement to the scheduler."""
        ready, spec = super().wake(), self.spec
        hosted = tuple(HostedModel(kv, f"simulated {kv.model}") for kv in spec.models)
        self.batch = FastBatch(
            hosted, spec.num_blocks, self.acked, spec.batch, spec.cache, self.lengths
        )
        self.batch.step_seconds = spec.step_s
        return ready

    def begin(self) -> bool:
        """Plan as many identical steps as possible. False if there is nothing to compute."""
        self.plan = self.batch.plan()
        if self.plan is None:
            return False
        sampled = sum(c.sampling is not None for c in self.plan.chunks)
        positions = sum(len(c.tokens) for c in self.plan.chunks)
        self.one_step_s = self.cost.forward_s(positions - sampled, sampled)
        self.steps_left = self.batch.num_identical()
        return True

    def skip(self, steps: int) -> None:
        """Complete so many of the identical steps, but not the last one."""
        assert steps < self.steps_left
        self.batch.skip(steps)
        self.steps_left -= steps
        self.unreported_steps += steps
        self.unreported_s += steps * self.one_step_s

    def finish(self) -> Outbox:
        """Complete all identical steps. Returns the messages to send."""
        if self.steps_left > 1:
            self.skip(self.steps_left - 1)
        self.steps_left = 0
        return self.finish_step(self.one_step_s)
