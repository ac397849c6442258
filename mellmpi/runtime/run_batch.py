"""Rank 0's part of a batch: open it, drive it to its end, say what it was like."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mellmpi.config import Config, ModelConfig, Options, UsageError
from mellmpi.frontend import BatchJob, Counts, ReplayJob, Served, ServedModel, Tokenizer, Unwritable
from mellmpi.models import Architecture
from mellmpi.runtime.batch_files import STDOUT, BatchFiles
from mellmpi.runtime.batch_front import BatchFront, poisson
from mellmpi.runtime.demo import demo_load
from mellmpi.runtime.ending import JobFailed
from mellmpi.runtime.scheduler import SchedulerLoop
from mellmpi.runtime.terminal import Terminal
from mellmpi.scheduler import ClusterScheduler, WorkerRegistry, WorkerState
from mellmpi.scheduler.policies import policy_for
from mellmpi.telemetry import Metrics
from mellmpi.transport import Transport

NEXT = """
That was the demo. Requests of your own, one JSON object a line in OpenAI's batch form:
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
    directories: tuple[Path, ...]  # of the models
    tokenizers: tuple[Tokenizer, ...]  # of the models; none for a replay
    transport: Transport
    beside: Callable[[], bool]  # one turn of a worker in this process; False: nothing to do
    ready: Callable[[], None]  # called once all workers have started

    def run(self) -> int:
        """The whole command; the exit code."""
        num_workers = self.transport.num_workers
        cluster, metrics = self.config.cluster, Metrics()
        scheduler = ClusterScheduler(
            num_workers, cluster, policy_for(cluster.policy, cluster.migrate)
        )
        loop = SchedulerLoop(self.transport, scheduler, metrics, time.perf_counter)
        show = 3 if self._is_demo and not self.options.show else self.options.show
        terminal = Terminal(self.files.is_quiet, show)
        names = ", ".join(model.name for model in self.config.models)
        with terminal.working(f"starting {num_workers} worker(s), {names}"):
            self._drive(loop, None, lambda: not loop.starting())
        self.ready()
        if warning := mixed_arithmetic(scheduler.registry.arithmetic):
            terminal.say(f"mellmpi: {warning}")
        if not scheduler.registry.models:
            raise JobFailed("no worker could start")
        rate = self._demo_rate(scheduler) if self._is_demo else self.options.request_rate
        job = self._open(self._served(scheduler), terminal)
        problems = self._answer(loop, job, terminal, rate)
        ended_s = time.perf_counter()
        loop.stop()
        problems += shortcomings(self.files, job.counts)
        problems += self._conclude(terminal, job, metrics, ended_s)
        if not problems and not job.counts.lines:
            terminal.say("mellmpi: there were no requests in the input")
        for problem in problems:
            terminal.say(f"mellmpi: {problem}")
        return 1 if problems or loop.all_lost() else 0

    @property
    def _is_demo(self) -> bool:
        return self.options.command == "demo"

    def _demo_rate(self, scheduler: ClusterScheduler) -> float:
        """Take as many of the prompts as suit this machine; requests a second."""
        registry, requests = scheduler.registry, self.files.requests
        assert requests is not None and requests.count is not None
        steps = [
            registry.estimates.steps.seconds(w) for w in registry.ledger.workers(WorkerState.ACTIVE)
        ]
        load = demo_load(steps, requests.count)
        if self.options.request_rate is not None:
            return self.options.request_rate
        requests.lines.most = load.count
        self.files.requests = replace(requests, count=load.count)
        return load.rate

    def _answer(
        self, loop: SchedulerLoop, job: BatchJob | ReplayJob, terminal: Terminal, rate: float | None
    ) -> list[str]:
        """Do the job to its end, or until answers cannot be written; what went wrong."""
        try:
            with terminal.progress(self.files.num_requests, job.counts) as advance:
                front = self._front(job, advance, rate)
                self._drive(loop, front, lambda: front.done)
            if self.files.output:
                self.files.output.flush()
        except Unwritable as error:
            return [f"{error}; {job.counts.completed} lines were answered"]
        return []

    def _drive(
        self, loop: SchedulerLoop, front: BatchFront | None, done: Callable[[], bool]
    ) -> None:
        while not done():
            busy = loop.turn(front)
            if not (self.beside() or busy) and not done():
                loop.wait(front)

    def _front(
        self, job: BatchJob | ReplayJob, advance: Callable[[int], None], rate: float | None
    ) -> BatchFront:
        if isinstance(job, ReplayJob):  # holding arrivals back would make it another load
            return BatchFront(job, job.arrivals(), advance, max_open=float("inf"))
        arrivals = None if rate is None else poisson(rate, self.config.cluster.seed)
        return BatchFront(job, arrivals, advance)

    # --- the job --------------------------------------------------------------------------------

    def _served(self, scheduler: ClusterScheduler) -> tuple[ServedModel, ...]:
        """What clients may ask for: the models' limits, and what fits into a worker's arena."""
        return tuple(
            self._served_model(scheduler.registry, model, directory)
            for model, directory in zip(self.config.models, self.directories, strict=True)
        )

    def _served_model(
        self, registry: WorkerRegistry, model: ModelConfig, directory: Path
    ) -> ServedModel:
        arch, ledger = Architecture.from_directory(directory), registry.ledger
        if (kv := registry.models.get(model.name)) is None:
            raise JobFailed(f"no worker could start {model.name}")
        largest = int(ledger.capacity[ledger.able(model.name)].max())
        room = largest // kv.block_bytes * kv.block_size
        limit = model.max_model_len or arch.max_position
        return ServedModel(
            name=model.name,
            max_model_len=min(limit, room),
            vocab_size=arch.vocab_size,
            eos_ids=arch.eos_ids,
        )

    def _open(self, models: tuple[ServedModel, ...], terminal: Terminal) -> BatchJob | ReplayJob:
        write = self.files.begin()
        if (workload := self.files.workload) is not None:
            try:
                return ReplayJob(workload, models, self.config.model.seed, write, terminal.answered)
            except ValueError as error:
                raise UsageError(str(error)) from error
        served = Served.of(*zip(models, self.tokenizers, strict=True))
        assert self.files.requests is not None
        lines, finished = self.files.requests.lines, self.files.finished
        grew = terminal.grew if terminal.shows else None
        write = write or (lambda _: None)
        return BatchJob(lines, write, served, finished, terminal.answered, grew)

    # --- the end --------------------------------------------------------------------------------

    def _conclude(
        self, terminal: Terminal, job: BatchJob | ReplayJob, metrics: Metrics, ended_s: float
    ) -> list[str]:
        """Write figures and picture, and show the summary; which could not be written."""
        report = {
            **metrics.report(ended_s),
            "lines": {
                "completed": job.counts.completed,
                "failed": job.counts.failed,
                "skipped": job.counts.skipped,
            },
            "failures": dict(job.counts.reasons),
            "config": self.config.to_dict(),
        }
        files, problems = self.files, []
        figures = [  # what, where, how it is made
            ("figures", files.report, lambda: (json.dumps(report, indent=2) + "\n").encode()),
            ("picture", files.timeline, lambda: self._picture(metrics, ended_s)),
        ]
        written = [("answers", files.output)] if files.output else []
        for what, file, make in figures:
            try:
                if file is not None:
                    file.replace(make())
                    written.append((what, file))
            except Unwritable as error:
                problems.append(str(error))
        named = [(what, file.name) for what, file in written if file.descriptor != STDOUT]
        terminal.summary(report, named)
        if self._is_demo:
            terminal.say(NEXT)
        return problems

    def _picture(self, metrics: Metrics, ended_s: float) -> bytes:
        from mellmpi.telemetry import draw

        return draw(metrics.series(ended_s), Path(self.options.timeline or "").suffix)


def mixed_arithmetic(by_worker: dict[int, str]) -> str:
    """What answers depend on where workers compute in different ways; "" where they do not."""
    kinds = dict.fromkeys(by_worker.values())
    if len(kinds) < 2:
        return ""
    workers = {k: [str(w) for w, one in by_worker.items() if one == k] for k in kinds}
    ways = "; ".join(f"{kind}: worker {', '.join(workers[kind])}" for kind in kinds)
    return (
        f"workers compute in different ways ({ways}): the answer to a request may depend on "
        "the worker that computes it"
    )


def shortcomings(files: BatchFiles, counts: Counts) -> Iterator[str]:
    """Why a job that came to its end has not done what it was asked to."""
    if files.requests and files.requests.lines.problem:
        yield f"{files.requests.lines.problem}; what came before that is answered"
    if 0 < counts.failed == counts.lines:
        reason, times = counts.reasons.most_common(1)[0]
        yield (
            f"none of the {counts.failed} lines could be answered, most of them ({times}) for "
            f"this reason: {reason}, such as: {counts.examples[reason]}"
        )
