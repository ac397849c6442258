"""Rank 0's part of a batch: open it, drive it to its end, say what it was like."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mellmpi.config import Config, UsageError
from mellmpi.core.cluster import ClusterScheduler
from mellmpi.core.policies import policy_for
from mellmpi.engine.architecture import Architecture
from mellmpi.front.batch import Answered, BatchJob, open_batch, pipe_batch
from mellmpi.front.lines import descriptor_reader
from mellmpi.front.openai import ServedModel
from mellmpi.front.tokenizer import Tokenizer
from mellmpi.metrics import Metrics
from mellmpi.options import Options
from mellmpi.protocol import ModelKv
from mellmpi.runtime.batch_front import BatchFront, poisson
from mellmpi.runtime.scheduler import SchedulerLoop
from mellmpi.runtime.standard_input import StandardInput
from mellmpi.runtime.terminal import Terminal
from mellmpi.transport.base import Transport

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
    """UsageError now rather than after the model was loaded."""
    if options.command != "run-batch":
        return
    if not options.input_file or not options.output_file:
        raise UsageError("run-batch needs -i requests.jsonl and -o answers.jsonl")
    if options.input_file != "-" and not os.access(options.input_file, os.R_OK):
        raise UsageError(f"-i {options.input_file}: there is no such file that can be read")
    for name in filter(None, (options.output_file, options.report, options.timeline)):
        if name != "-" and not Path(name).absolute().parent.is_dir():
            raise UsageError(f"{name}: there is no directory {Path(name).absolute().parent}")


@dataclass
class Rank0:
    """The scheduler's rank, from the start of the workers to the end of the job."""

    options: Options
    config: Config
    directory: Path  # of the model
    transport: Transport
    beside: Callable[[], bool]  # one turn of a worker in this process; False: nothing to do

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
        with terminal.working(f"starting {num_workers} worker(s), {self.config.model.name}"):
            self._drive(loop, None, lambda: not loop.starting())
        if not scheduler.fleet.models:
            raise RuntimeError("no worker could start")
        job = self._open(self._served(scheduler), terminal.answered)
        with terminal.progress(self._num_lines(), job.counts) as advance:
            front = BatchFront(job, self._arrivals(), advance)
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

    def _arrivals(self) -> Any:
        rate = self.options.request_rate
        return None if rate is None else poisson(rate, self.config.cluster.seed)

    # --- the job --------------------------------------------------------------------------------

    def _served(self, scheduler: ClusterScheduler) -> ServedModel:
        """What clients may ask for: the model's limits, and what fits into one worker's arena."""
        arch = Architecture.from_directory(self.directory)
        name = self.config.model.name
        kv: ModelKv = scheduler.fleet.models[name]
        largest = int(scheduler.fleet.ledger.capacity.max())
        room = largest // kv.block_bytes * kv.block_size
        limit = self.config.model.max_model_len or arch.max_position
        return ServedModel(
            name=name, max_model_len=min(limit, room), vocab_size=arch.vocab_size,
            eos_ids=arch.eos_ids,
        )  # fmt: skip

    def _open(self, served: ServedModel, answered: Callable[[Answered], None]) -> BatchJob:
        template = self.config.model.chat_template
        tokenizer = Tokenizer.load(self.directory, Path(template) if template else None)
        output = self.options.output_file
        if self._source() is not None and output not in (None, "-"):
            return open_batch(self._source(), Path(output), tokenizer, served, answered)
        source = self._source()
        read = (
            StandardInput().read
            if source is None
            else descriptor_reader(os.open(source, os.O_RDONLY))
        )
        return pipe_batch(read, self._sink(), tokenizer, served, answered)

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
        return self.options.command != "demo" and self.options.output_file in (None, "-")

    def _num_lines(self) -> int | None:
        """Lines of the input, for the progress bar; None where it is a pipe."""
        if (source := self._source()) is None:
            return None
        with source.open("rb") as lines:
            return sum(1 for line in lines if line.strip())

    # --- the end --------------------------------------------------------------------------------

    def _conclude(self, terminal: Terminal, job: BatchJob, metrics: Metrics,
                  ended_s: float) -> None:  # fmt: skip
        report = {
            **metrics.report(ended_s),
            "lines": {"completed": job.counts.completed, "failed": job.counts.failed,
                      "skipped": job.counts.skipped},
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
