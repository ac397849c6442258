"""Rank 0's part of a batch: open it, drive it to its end, say what it was like."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from mellmpi.config import Config, ModelConfig, UsageError
from mellmpi.core.cluster import ClusterScheduler
from mellmpi.core.fleet import Fleet
from mellmpi.core.policies import policy_for
from mellmpi.engine.architecture import Architecture
from mellmpi.front.batch import Answered, BatchJob, open_batch, pipe_batch, writer
from mellmpi.front.lines import descriptor_reader
from mellmpi.front.openai import Served, ServedModel
from mellmpi.front.replay import ReplayJob
from mellmpi.front.tokenizer import Tokenizer
from mellmpi.metrics import Metrics
from mellmpi.options import Options
from mellmpi.runtime.batch_front import BatchFront, poisson
from mellmpi.runtime.scheduler import SchedulerLoop
from mellmpi.runtime.standard_input import StandardInput
from mellmpi.runtime.terminal import Terminal
from mellmpi.transport.base import Transport
from mellmpi.workload import Workload, load

STDOUT = 1
NEXT = """
That was the demo. Requests of your own, one JSON object a line in OpenAI's batch form:
  mpirun -np 3 python -m mellmpi run-batch -i requests.jsonl -o answers.jsonl --model DIR
  cat requests.jsonl | mpirun -np 3 python -m mellmpi > answers.jsonl
  python -m mellmpi --help
"""


def demo_input() -> Path:
    """The prompts that ship with the package."""
    return Path(str(files("mellmpi.front") / "demo_prompts.jsonl"))


def check_files(options: Options) -> None:
    """Say what a trace is. UsageError now rather than after the model was loaded."""
    if options.command != "run-batch":
        return
    if options.replay:
        _check_replay(options)
    elif not options.input_file or not options.output_file:
        raise UsageError("run-batch needs -i requests.jsonl and -o answers.jsonl, or --replay "
                         "trace.csv")  # fmt: skip
    elif options.input_file != "-" and not os.access(options.input_file, os.R_OK):
        raise UsageError(f"-i {options.input_file}: there is no such file that can be read")
    for name in filter(None, (options.output_file, options.report, options.timeline)):
        if name != "-" and not Path(name).absolute().parent.is_dir():
            raise UsageError(f"{name}: there is no directory {Path(name).absolute().parent}")
    if options.replay:
        sys.stderr.write(f"mellmpi: {trace(options).source}\n")


def _check_replay(options: Options) -> None:
    try:
        trace(options)
    except ValueError as error:
        raise UsageError(f"--replay {error}") from error
    name = options.output_file
    if name not in (None, "-") and Path(name).exists() and Path(name).stat().st_size:
        raise UsageError(f"-o {name} exists, and a replay starts anew: give another name")


@lru_cache(maxsize=1)  # checked before the model is there, used after
def trace(options: Options) -> Workload:
    """What is to be replayed. ValueError as `load`."""
    assert options.replay is not None
    workload = load(options.replay).faster(options.rate_scale or 1.0)
    workload = workload.longer(options.length_scale or 1.0)
    return workload.first(options.max_requests or len(workload))


@dataclass
class Rank0:
    """The scheduler's rank, from the start of the workers to the end of the job."""

    options: Options
    config: Config
    directories: tuple[Path, ...]  # of the models
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
        is_demo = self.options.command == "demo"
        terminal = Terminal(quiet=self._sink_is_stdout(), show=3 if is_demo else self.options.show)
        names = ", ".join(model.name for model in self.config.models)
        with terminal.working(f"starting {num_workers} worker(s), {names}"):
            self._drive(loop, None, lambda: not loop.starting())
        self.ready()
        if not scheduler.fleet.models:
            raise RuntimeError("no worker could start")
        job = self._open(self._served(scheduler), terminal.answered)
        with terminal.progress(self._num_lines(), job.counts) as advance:
            front = self._front(job, advance)
            self._drive(loop, front, lambda: front.done)
        ended_s = time.perf_counter()
        loop.stop()
        self._conclude(terminal, job, metrics, ended_s)
        return 1 if loop.all_lost() else 0

    def _drive(self, loop: SchedulerLoop, front: BatchFront | None,
               done: Callable[[], bool]) -> None:  # fmt: skip
        while not done():
            busy = loop.turn(front)
            if not (self.beside() or busy) and not done():
                loop.wait(front)

    def _front(self, job: BatchJob | ReplayJob, advance: Callable[[int], None]) -> BatchFront:
        if isinstance(job, ReplayJob):  # holding arrivals back would make it another load
            return BatchFront(job, job.arrivals(), advance, max_open=float("inf"))
        rate = self.options.request_rate
        arrivals = None if rate is None else poisson(rate, self.config.cluster.seed)
        return BatchFront(job, arrivals, advance)

    # --- the job --------------------------------------------------------------------------------

    def _served(self, scheduler: ClusterScheduler) -> tuple[ServedModel, ...]:
        """What clients may ask for: the models' limits, and what fits into a worker's arena."""
        return tuple(
            self._served_model(scheduler.fleet, model, directory)
            for model, directory in zip(self.config.models, self.directories, strict=True)
        )

    def _served_model(self, fleet: Fleet, model: ModelConfig, directory: Path) -> ServedModel:
        arch, ledger = Architecture.from_directory(directory), fleet.ledger
        if (kv := fleet.models.get(model.name)) is None:
            raise RuntimeError(f"no worker could start {model.name}")
        largest = int(ledger.capacity[ledger.able(model.name)].max())
        room = largest // kv.block_bytes * kv.block_size
        limit = model.max_model_len or arch.max_position
        return ServedModel(
            name=model.name, max_model_len=min(limit, room), vocab_size=arch.vocab_size,
            eos_ids=arch.eos_ids,
        )  # fmt: skip

    def _open(self, models: tuple[ServedModel, ...],
              answered: Callable[[Answered], None]) -> BatchJob | ReplayJob:  # fmt: skip
        if self.options.replay:
            write = writer(self._sink()) if self.options.output_file else None
            return ReplayJob(trace(self.options), models, self.config.model.seed, write, answered)
        template = self.config.model.chat_template
        tokenizers = [
            Tokenizer.load(directory, Path(template) if template else None)
            for directory in self.directories
        ]
        served = Served.of(*zip(models, tokenizers, strict=True))
        output = self.options.output_file
        if self._source() is not None and output not in (None, "-"):
            return open_batch(self._source(), Path(output), served, answered)
        source = self._source()
        read = (
            StandardInput().read
            if source is None
            else descriptor_reader(os.open(source, os.O_RDONLY))
        )
        return pipe_batch(read, self._sink(), served, answered)

    def _source(self) -> Path | None:
        """The file that requests come from; None: standard input."""
        if self.options.command == "demo":
            return demo_input()
        name = self.options.input_file
        return None if name in (None, "-") else Path(name)

    def _sink(self) -> int:
        name = self.options.output_file
        if self.options.command == "demo":
            name = name or os.devnull
        if name in (None, "-"):
            return STDOUT
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _sink_is_stdout(self) -> bool:
        if self.options.command == "demo" or self.options.replay:
            return self.options.output_file == "-"
        return self.options.output_file in (None, "-")

    def _num_lines(self) -> int | None:
        """Lines of the input, for the progress bar; None where it is a pipe."""
        if self.options.replay:
            return len(trace(self.options))
        if (source := self._source()) is None:
            return None
        with source.open("rb") as lines:
            return sum(1 for line in lines if line.strip())

    # --- the end --------------------------------------------------------------------------------

    def _conclude(self, terminal: Terminal, job: BatchJob | ReplayJob, metrics: Metrics,
                  ended_s: float) -> None:  # fmt: skip
        report = {
            **metrics.report(ended_s),
            "lines": {"completed": job.counts.completed, "failed": job.counts.failed,
                      "skipped": job.counts.skipped},
            "failures": dict(job.counts.reasons),
            "config": self.config.to_dict(),
        }  # fmt: skip
        if self.options.report:
            Path(self.options.report).write_text(json.dumps(report, indent=2) + "\n")
        if self.options.timeline:
            from mellmpi.timeline import draw  # matplotlib is slow to import

            draw(metrics.series(ended_s), Path(self.options.timeline))
        terminal.summary(report, self.options)
        if self.options.command == "demo":
            terminal.say(NEXT)
