"""Rank 0's part of a server: runs until a signal ends it, or no worker is left."""

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mellmpi import __version__
from mellmpi.config import Config, Options
from mellmpi.files import Destination
from mellmpi.frontend import ServedModel
from mellmpi.protocol import ModelFiles, ModelLimits, StartServer
from mellmpi.runtime.ending import JobFailed
from mellmpi.runtime.scheduler import SchedulerLoop
from mellmpi.runtime.served_models import mixed_arithmetic, served_models
from mellmpi.runtime.serving import Door, HttpFront, Progress, say
from mellmpi.runtime.snapshot import JobDescription, Snapshots
from mellmpi.runtime.tracing import Tracing
from mellmpi.scheduler import ClusterScheduler
from mellmpi.scheduler.policies import policy_for
from mellmpi.telemetry import Metrics, Observers, Recent
from mellmpi.transport import Transport

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass
class ServingRank0:
    """The scheduler's rank of a server, from the start of the workers to the end of the job."""

    options: Options
    config: Config
    door: Door
    trace: Destination | None
    directories: tuple[Path, ...]  # one per model
    transport: Transport
    hosts: list[str]  # by rank
    run_local_worker: Callable[[], bool]  # one iteration of a worker in this process, if any
    on_ready: Callable[[], None]  # called when all workers have started

    def run(self) -> int:
        """Serve until a signal, or until no worker is left. Returns the exit code."""
        cluster, self._metrics = self.config.cluster, Metrics()
        self._scheduler = ClusterScheduler(
            self.transport.num_workers, cluster, policy_for(cluster.policy, cluster.migrate)
        )
        tracing, recent = Tracing(self.trace), Recent()
        self._progress_watch, self._stalled = Progress(), ""
        observer = Observers(tracing.beside(self._metrics), recent, self._progress_watch)
        self._loop = SchedulerLoop(self.transport, self._scheduler, observer, time.perf_counter)
        self._snapshots = Snapshots(self._scheduler, recent, self._description())
        self._front = HttpFront(self.door.listener, self.door.servers, self.door.settings)
        self._front.questions = {
            "load": self._load,
            "progress": self._progress,
            "metrics": self._samples,
            "snapshot": self._snapshot,
            "loglevel": set_log_level,
        }
        self._until_s = float("inf")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._start()
            self._drive(lambda: self._front.done or self._loop.all_lost())
            if self._loop.all_lost():
                raise JobFailed("no worker is left")
        finally:
            self._loop.stop()
            self._front.close()
            for problem in tracing.close(time.perf_counter()):
                say(problem)
        return 0

    def _start(self) -> None:
        began_s = time.perf_counter()
        template = self.config.model.chat_template
        files = [
            ModelFiles(model.name, str(directory), os.path.abspath(template) if template else "")
            for model, directory in zip(self.config.models, self.directories, strict=True)
        ]
        self._front.start(StartServer(tuple(files), 0, 1))
        self._front.set_state("starting", "the workers are loading the model")
        self._drive(lambda: not self._loop.starting())
        self.on_ready()
        registry = self._scheduler.registry
        if warning := mixed_arithmetic(registry.arithmetic):
            say(warning)
        served = served_models(self.config, self.directories, registry)
        self._front.set_state("ready", "", tuple(map(_limits, served)))
        names = ", ".join(model.name for model in served)
        took_s = time.perf_counter() - began_s
        say(f"ready: {names} on {self.transport.num_workers} worker(s), after {took_s:.1f} s")

    def _drive(self, done: Callable[[], bool]) -> None:
        loop, front = self._loop, self._front
        while not done() and time.perf_counter() < self._until_s:
            busy = loop.run_once(front)
            self._tell_state()
            if not (self.run_local_worker() or busy) and not done():
                loop.wait(front)

    def _tell_state(self) -> None:
        """Tell the API servers when the server begins to shut down, when requests stop making
        progress, and when they go on."""
        if self._until_s < float("inf"):
            if not self._front.drains:
                self._front.drain()
                limit_s = self.options.http.shutdown_timeout
                say(f"shutting down; requests in progress may end within {limit_s:.0f} s")
            return
        running = self._scheduler.registry.ledger.num_requests.sum()
        problem = self._progress_watch.problem(time.perf_counter(), int(running))
        if bool(problem) != bool(self._stalled):
            self._front.set_state("stalled" if problem else "ready", problem)
            say(problem or "requests make progress again")
        self._stalled = problem

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Finish the open calls; a second signal ends at once."""
        if self._until_s < float("inf"):
            raise KeyboardInterrupt
        limit_s = self.options.http.shutdown_timeout
        self._until_s = time.perf_counter() + limit_s  # `_drive` does the rest: it may be writing

    # --- questions of API servers ----------------------------------------------------------------

    def _load(self) -> str:
        return json.dumps({"server_load": len(self._scheduler.records)})

    def _samples(self) -> str:
        """Return the samples of `/metrics`; API servers render them."""
        links = self._scheduler.registry.estimates.links.bandwidths()
        samples = self._metrics.samples(time.perf_counter(), links)
        return json.dumps({"samples": samples, "vllm": self.options.http.metrics_vllm_names})

    def _description(self) -> JobDescription:
        models = [model.name for model in self.config.models]
        policy, start_s = self.config.cluster.policy, time.perf_counter()
        return JobDescription(__version__, policy, models, self.hosts, start_s)

    def _snapshot(self) -> str:
        return json.dumps(self._snapshots.take(time.perf_counter(), time.time()))

    def _progress(self, request_ids: list[int]) -> str:
        """Return the state of the first of these requests that has no token yet, in words."""
        records = self._scheduler.records
        for request_id in request_ids:
            if (record := records.get(request_id)) is not None and not record.log.tokens:
                ahead = len(self._scheduler.queue)
                if record.worker is None:
                    return f"waiting, {ahead} in the queue"
                return f"prefilling {len(record.request.prompt)} tokens"
        return "working"


def _limits(model: ServedModel) -> ModelLimits:
    return ModelLimits(model.name, model.max_model_len, model.vocab_size, model.eos_ids)


def set_log_level(level: str) -> str:
    """Change the log level of rank 0. Raises ValueError."""
    if level.upper() not in LOG_LEVELS:
        raise ValueError(f"{level!r:.40} is none of {', '.join(LOG_LEVELS).lower()}")
    logging.getLogger("mellmpi").setLevel(level.upper())
    return ""
