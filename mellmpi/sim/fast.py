"""A worker that makes many steps at once: BatchScheduler itself, and a way to skip like steps.

As long as nobody ends, needs prefill, overflows or writes to the worker, all steps are alike, and
what several of them do is a sum. A property test holds it to stepping one by one.
"""

from collections.abc import Sequence
from typing import Any

from mellmpi.costs import CostModel
from mellmpi.protocol import Address, HostedModel, StepPlan, StepResult, WorkerReady
from mellmpi.sim.executor import SilentExecutor
from mellmpi.sim.progress import STOP, zeros
from mellmpi.sim.worker import SimWorker, WorkerSpec
from mellmpi.worker import BatchScheduler
from mellmpi.worker import Sequence as Live


class CountingExecutor(SilentExecutor):
    """Answers of given lengths: zeros, and at last a stop token. No arena."""

    def __init__(self, lengths: Sequence[int]):
        self._lengths = lengths  # by request id

    def execute(self, plan: StepPlan) -> StepResult:
        """One token a sampled chunk, in plan order."""
        sampled = [c for c in plan.chunks if c.sampling is not None]
        lengths = [(len(c.history[1]) + 1, self._lengths[c.request_id]) for c in sampled]
        return StepResult(
            tuple([STOP if n >= m else 0 for n, m in lengths]), (None,) * len(sampled)
        )


class FastBatch(BatchScheduler):
    """A step can be repeated without planning it again."""

    def __init__(self, *args: Any, lengths: Sequence[int]):
        super().__init__(*args)
        self._lengths = lengths  # of the answers, by request id
        self._has_preempted = False  # for the step that was planned last

    def plan(self) -> StepPlan | None:
        """The next forward pass, or None with nothing to compute."""
        self._has_preempted = False
        return super().plan()

    def _preempt(self, sequence: Live) -> None:
        self._has_preempted = True  # it is told of after this step
        super()._preempt(sequence)

    def num_alike(self) -> int:
        """So many steps, the planned one included, are alike if nobody writes."""
        planned = self._planned
        if self._sender.closing:
            return 1
        computable = [s for s in self.sequences.values() if s.computable]
        left_out = len(computable) - len(planned)
        if self._has_preempted or (left_out and len(planned) < self._limits.max_num_seqs):
            return 1
        if left_out and len({s.request.model for s in computable}) > 1:
            return 1
        if any(s.arrival is not None or s.num_tokens - s.num_computed > 1 for s in planned):
            return 1
        return self._with_room(min(self._tokens_left(s) for s in planned))

    def _tokens_left(self, sequence: Live) -> int:
        length = min(self._lengths[sequence.request.id], sequence.request.sampling.max_tokens)
        return length - len(sequence.outputs)

    def _with_room(self, most: int) -> int:
        """The largest number of steps up to `most` for which there are blocks; at least one."""
        least, free = 1, self.pool.num_free
        while least < most:
            middle = (least + most + 1) // 2
            more = sum(
                max(0, self.tables.needed(s, s.num_tokens + middle - 1) - len(s.block_table))
                for s in self._planned
            )
            least, most = (middle, most) if more <= free else (least, middle - 1)
        return least

    def skip(self, steps: int) -> None:
        """The planned step and as many like it are over, and the next one is planned."""
        for sequence in self._planned:
            sequence.num_computed += steps
            sequence.outputs += zeros(steps)
            self._reports.decoded(sequence, steps)
            grown = self.tables.grow(sequence, sequence.num_tokens)
            assert grown, f"request {sequence.request.id} was given a step without room"


class FastWorker(SimWorker):
    """One simulated worker that is told how many of its steps are over."""

    def __init__(self, id: int, spec: WorkerSpec, cost: CostModel, lengths: Sequence[int]):
        self.cost, self.lengths = cost, lengths
        self.steps_left, self.one_step_s = 0, 0.0  # like the one under way, this included
        super().__init__(id, spec)

    def wake(self) -> WorkerReady:
        """Batch scheduler anew; the announcement of it."""
        ready, spec = super().wake(), self.spec
        hosted = tuple(HostedModel(kv, f"simulated {kv.model}") for kv in spec.models)
        self.batch: FastBatch = FastBatch(
            hosted, spec.num_blocks, self.acked, spec.batch, spec.cache, lengths=self.lengths
        )
        self.batch.step_seconds = spec.step_s
        return ready

    def begin(self) -> bool:
        """Plan as many like steps as there are; False: nothing to compute."""
        self.plan = self.batch.plan()
        if self.plan is None:
            return False
        sampled = sum(c.sampling is not None for c in self.plan.chunks)
        positions = sum(len(c.tokens) for c in self.plan.chunks)
        self.one_step_s = self.cost.forward_s(positions - sampled, sampled)
        self.steps_left = self.batch.num_alike()
        return True

    def skip(self, steps: int) -> None:
        """So many are over, but not the last one."""
        assert steps < self.steps_left
        self.batch.skip(steps)
        self.steps_left -= steps
        self.unreported_steps += steps
        self.unreported_s += steps * self.one_step_s

    def finish(self) -> list[tuple[Address, Any]]:
        """All are over; what they make the worker send."""
        if self.steps_left > 1:
            self.skip(self.steps_left - 1)
        self.steps_left = 0
        return self.finish_step(self.one_step_s)
