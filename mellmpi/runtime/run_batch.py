"""Rank 0's part of a batch: opens the batch, runs it to its end, writes report and summary."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mellmpi.config import Config, Options, UsageError
from mellmpi.files import Destination, Unwritable
from mellmpi.frontend import (
    BatchJob,
    Counts,
    ReplayJob,
    ServedModel,
    ServedModels,
    Tokenizer,
)
from mellmpi.runtime.batch_files import STDOUT, BatchFiles
from mellmpi.runtime.batch_front import BatchFront, RequestSource, poisson
from mellmpi.runtime.demo import DemoLoad, demo_arrivals, demo_load
from mellmpi.runtime.scheduler import SchedulerLoop
from mellmpi.runtime.served_models import mixed_arithmetic, served_models
from mellmpi.runtime.terminal import Terminal
from mellmpi.runtime.tracing import Tracing
from mellmpi.scheduler import ClusterScheduler, WorkerState
from mellmpi.scheduler.policies import policy_for
from mellmpi.telemetry import Metrics
from mellmpi.transport import Transport

AFTER_DEMO = """
That was the demo. For your own requests, one JSON object per line in OpenAI's batch format, type:
  mpirun -np 3 python -m mellmpi run-batch -i requests.jsonl -o answers.jsonl --model DIR
  cat requests.jsonl | mpirun -np 3 python -m mellmpi > answers.jsonl
  python -m mellmpi --help
"""


@dataclass
class Rank0:
    """The scheduler's rank, from the start of the workers to the end of the job."""

    options: Options
    config: Config
    files: BatchFiles
    directories: tuple[Path, ...]  # one per model
    tokenizers: tuple[Tokenizer, ...]  # one per model; none for a replay
    transport: Transport
    hosts: list[str]  # by rank
    run_local_worker: Callable[[], bool]  # one iteration of a worker in this process, if any
    on_ready: Callable[[], None]  # called when all workers have started

    def run(self) -> int:
        """Run the command. Returns the exit code."""
        num_workers = self.transport.num_workers
        cluster, metrics, tracing = self.config.cluster, Metrics(), Tracing(self.files.trace)
        scheduler = ClusterScheduler(
            num_workers, cluster, policy_for(cluster.policy, cluster.migrate)
        )
        observer = tracing.beside(metrics)
        loop = SchedulerLoop(self.transport, scheduler, observer, time.perf_counter)
        show = 3 if self._is_demo and not self.options.show else self.options.show
        terminal = Terminal(self.files.is_quiet, show)
        names = ", ".join(model.name for model in self.config.models)
        with terminal.working(f"starting {num_workers} worker(s), {names}"):
            self._drive(loop, None, lambda: not loop.starting())
        self.on_ready()
        if warning := mixed_arithmetic(scheduler.registry.arithmetic):
            terminal.say(f"mellmpi: {warning}")
        served = served_models(self.config, self.directories, scheduler.registry)
        arrivals = self._arrivals(scheduler)
        source = self._open(served, terminal)
        problems = self._answer(loop, source, terminal, arrivals)
        ended_s = time.perf_counter()
        loop.stop()
        problems += shortcomings(self.files, source.counts)
        problems += tracing.close(ended_s)
        problems += self._conclude(terminal, source, metrics, ended_s)
        if not problems and not source.counts.lines:
            terminal.say("mellmpi: there were no requests in the input")
        for problem in problems:
            terminal.say(f"mellmpi: {problem}")
        return 1 if problems or loop.all_lost() else 0

    @property
    def _is_demo(self) -> bool:
        return self.options.command == "demo"

    def _arrivals(self, scheduler: ClusterScheduler) -> Iterator[float] | None:
        """Arrival times of the requests, in seconds; None: all at once."""
        seed, rate = self.config.cluster.seed, self.options.request_rate
        if rate is not None:
            return poisson(rate, seed)
        return demo_arrivals(self._demo_load(scheduler), seed) if self._is_demo else None

    def _demo_load(self, scheduler: ClusterScheduler) -> DemoLoad:
        """Limit the demo's requests to a load that suits this machine."""
        registry, requests = scheduler.registry, self.files.requests
        assert requests is not None and requests.count is not None
        steps = [
            registry.estimates.steps.seconds(w) for w in registry.ledger.workers(WorkerState.ACTIVE)
        ]
        load = demo_load(steps, requests.count)
        requests.lines.max_lines = load.count
        self.files.requests = replace(requests, count=load.count)
        return load

    def _answer(
        self,
        loop: SchedulerLoop,
        source: RequestSource,
        terminal: Terminal,
        arrivals: Iterator[float] | None,
    ) -> list[str]:
        """Run the batch to its end, or until answers cannot be written. Returns the problems."""
        try:
            with terminal.progress(self.files.num_requests, source.counts) as advance:
                front = self._front(source, advance, arrivals)
                self._drive(loop, front, lambda: front.done)
            if self.files.output:
                self.files.output.flush()
        except Unwritable as error:
            return [f"{error}; {source.counts.completed} lines were answered"]
        return []

    def _drive(
        self, loop: SchedulerLoop, front: BatchFront | None, done: Callable[[], bool]
    ) -> None:
        while not done():
            busy = loop.run_once(front)
            if not (self.run_local_worker() or busy) and not done():
                loop.wait(front)

    def _front(
        self,
        source: RequestSource,
        advance: Callable[[int], None],
        arrivals: Iterator[float] | None,
    ) -> BatchFront:
        if isinstance(source, ReplayJob):  # unlimited: delaying arrivals would change the load
            return BatchFront(source, source.arrivals(), advance, max_open=float("inf"))
        return BatchFront(source, arrivals, advance)

    # --- the source of requests -----------------------------------------------------------------

    def _open(self, models: tuple[ServedModel, ...], terminal: Terminal) -> RequestSource:
        write = self.files.begin()
        if (workload := self.files.workload) is not None:
            try:
                return ReplayJob(workload, models, self.config.model.seed, write, terminal.answered)
            except ValueError as error:
                raise UsageError(str(error)) from error
        served = ServedModels.of(*zip(models, self.tokenizers, strict=True))
        assert self.files.requests is not None
        lines, finished = self.files.requests.lines, self.files.finished
        on_text = terminal.show_text if terminal.shows else None
        write = write or (lambda _: None)
        return BatchJob(lines, write, served, finished, terminal.answered, on_text)

    # --- the end --------------------------------------------------------------------------------

    def _conclude(
        self, terminal: Terminal, source: RequestSource, metrics: Metrics, ended_s: float
    ) -> list[str]:
        """Write report and picture, and show the summary. Returns the problems."""
        report = {
            **metrics.report(ended_s),
            "lines": {
                "completed": source.counts.completed,
                "failed": source.counts.failed,
                "skipped": source.counts.skipped,
            },
            "failures": dict(source.counts.reasons),
            "config": self.config.to_dict(),
        }
        files, problems = self.files, []
        outputs: list[tuple[str, Destination | None, Callable[[], bytes]]] = [
            ("figures", files.report, lambda: (json.dumps(report, indent=2) + "\n").encode()),
            ("picture", files.timeline, lambda: self._draw_timeline(metrics, ended_s)),
        ]
        written = [("answers", files.output)] if files.output else []
        for kind, file, make in outputs:
            try:
                if file is not None:
                    file.replace(make())
                    written.append((kind, file))
            except Unwritable as error:
                problems.append(str(error))
        written += [("trace", files.trace)] if files.trace else []
        named = [(kind, file.name) for kind, file in written if file.descriptor != STDOUT]
        terminal.summary(report, named)
        if self._is_demo:
            terminal.say(AFTER_DEMO)
        return problems

    def _draw_timeline(self, metrics: Metrics, ended_s: float) -> bytes:
        from mellmpi.telemetry.pictures import draw

        return draw(metrics.series(ended_s), Path(self.options.timeline or "").suffix)


def shortcomings(files: BatchFiles, counts: Counts) -> Iterator[str]:
    """Yield the reasons why a finished batch counts as failed."""
    if files.requests and files.requests.lines.problem:
        yield f"{files.requests.lines.problem}; the requests before that point are answered"
    if 0 < counts.failed == counts.lines:
        reason, times = counts.reasons.most_common(1)[0]
        yield (
            f"none of the {counts.failed} lines could be answered; the most frequent reason "
            f"({times} lines) is {reason}, for example: {counts.examples[reason]}"
        )
