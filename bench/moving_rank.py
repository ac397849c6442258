"""One rank of the job that moving.py starts: requests move when and how the job file says.

    mpirun -n 3 … python bench/moving_rank.py DIRECTORY

DIRECTORY holds `job.json` (see `moving.run`) and the model. Rank 0 writes `rows.json`, one row per
move; each worker writes the times of its tokens.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moving import HERE, SHAPE, WARM_UP_TOKENS

TOKEN_BYTES = 2 * 4 * 16 * 64 * 4  # of KV, in float32
ARENA_TOKENS = 20_000
LONG = 1024  # tokens of a context that hardly grows during the moves
OTHERS_TOKENS = 800  # longest output of the other requests
LIMIT_S = 60.0  # for any condition to become true


class Stamped:
    """An engine that records the time of each token."""

    def __init__(self, engine: Any, stamps: list[tuple[int, float]]):
        self._engine, self._stamps = engine, stamps
        self.arena, self.models, self.release = engine.arena, engine.models, engine.release
        self.arithmetic, self.warm_up_s = engine.arithmetic, engine.warm_up_s

    def execute(self, plan: Any) -> Any:
        result = self._engine.execute(plan)
        now = time.perf_counter()
        self._stamps += [(c.request_id, now) for c in plan.chunks if c.sampling is not None]
        return result


def work(transport: Any, directory: Path) -> None:
    """Run a worker until `Stop`."""
    from mellmpi.config import BatchConfig, CacheConfig, ModelConfig
    from mellmpi.engine import build_executor
    from mellmpi.models import resolve
    from mellmpi.runtime.worker import Worker

    directory.joinpath("cache").mkdir(exist_ok=True)
    weights = resolve(f"random:{directory}", directory / "cache")
    stamps: list[tuple[int, float]] = []
    cache = CacheConfig(kv_cache_memory_bytes=ARENA_TOKENS * TOKEN_BYTES)
    model = ModelConfig(model=f"random:{directory}", dtype="float32")

    def build() -> Stamped:
        engine = build_executor(weights, model, cache, device="cpu", num_threads=1)
        engine.arena.elements.zero_()  # touches its pages, as in a worker that has served
        return Stamped(engine, stamps)

    worker = Worker(transport, build, BatchConfig(), cache)
    worker.start()
    while not worker.stopped:
        if not worker.run_once():
            worker.wait()
    (directory / f"tokens{transport.worker}.json").write_text(json.dumps(stamps))


class Mover:
    """Rank 0: front, policy and observer in one, around the real scheduler loop."""

    def __init__(self, transport: Any):
        from mellmpi.config import ClusterConfig
        from mellmpi.runtime.scheduler import SchedulerLoop
        from mellmpi.scheduler import ClusterScheduler
        from mellmpi.scheduler.policies import Policy
        from mellmpi.telemetry import Metrics

        config = ClusterConfig(rebalance_every_s=1e-3, migration_limit_s=1e6)
        self.moves: list[Any] = []
        policy = Policy(lambda view, row, model: self.place_at, self._rebalance)
        self.scheduler = ClusterScheduler(2, config, policy)
        self.metrics = Metrics()
        self._command, self.metrics.command = self.metrics.command, self._observe
        self.loop = SchedulerLoop(transport, self.scheduler, self.metrics, time.perf_counter)
        self.place_at, self.done, self.next_id = 1, False, 0
        self.tokens: dict[int, int] = {}
        self._inbox: list[Any] = []
        self.started: Any = None
        self.ended: Any = None

    # --- front ----------------------------------------------------------------------------------

    descriptors = ()

    def flush(self) -> None:
        """Do nothing."""

    def inbox(self, now: float) -> list[Any]:
        inbox, self._inbox = self._inbox, []
        return inbox

    def due_s(self, now: float) -> float:
        return 1.0

    def deliver(self, command: Any) -> None:
        self.tokens[command.request_id] += len(command.tokens)

    # --- policy and observer --------------------------------------------------------------------

    def _rebalance(self, view: Any) -> list[Any]:
        moves, self.moves = self.moves, []
        return moves

    def _observe(self, now: float, destination: Any, command: Any) -> None:
        from mellmpi.protocol import MigrationEnded, MigrationStarted

        if isinstance(command, MigrationStarted):
            self.started = (now, command)
        if isinstance(command, MigrationEnded):
            self.ended = (now, command)
        self._command(now, destination, command)

    # --- requests and moves ---------------------------------------------------------------------

    def until(self, condition: Callable[[], Any]) -> None:
        stop_s = time.perf_counter() + LIMIT_S
        while not condition():
            assert time.perf_counter() < stop_s, f"{LIMIT_S:g} s without progress"
            if not self.loop.run_once(self):
                self.loop.wait(self)

    def submit(self, num_prompt: int, worker: int, max_tokens: int) -> int:
        from mellmpi.protocol import GREEDY, Request, Submit

        self.next_id += 1
        prompt = tuple((7 * i + self.next_id) % SHAPE["vocab_size"] for i in range(num_prompt))
        sampling = replace(GREEDY, max_tokens=max_tokens)
        self.place_at, self.tokens[self.next_id] = worker, 0
        model = next(iter(self.scheduler.registry.models))
        self._inbox.append(Submit(Request(self.next_id, model, prompt, sampling, None, 0, None)))
        return self.next_id

    def cancel(self, request_id: int) -> None:
        from mellmpi.protocol import Cancel

        self._inbox.append(Cancel(request_id, "gone"))
        self.until(lambda: request_id not in self.scheduler.records)

    def kept_small(self, request_id: int, worker: int) -> int:
        """Return the request, or a new one if it has grown: the arena must not fill."""
        if self.tokens[request_id] < OTHERS_TOKENS:
            return request_id
        self.cancel(request_id)
        return self.decoded(worker)

    def decoded(self, worker: int) -> int:
        """Submit another request to this worker and wait for its first token."""
        request_id = self.submit(64, worker, max_tokens=10**4)
        self.until(lambda: self.tokens[request_id])
        return request_id

    def round(self, context: int, modes: list[str | None]) -> list[dict[str, Any]]:
        """Move once in each mode, from worker 1 to worker 2 and back. Returns a row per move.

        One long request makes all moves: it hardly grows, and its prefill takes long.
        """
        rows: list[dict[str, Any]] = []
        for i, mode in enumerate(modes):
            if not i or context < LONG:
                request_id, src = self.submit(context, 1 + i % 2, max_tokens=4000), 1 + i % 2
            rows.append(self.move(request_id, mode, src) | {"context": context})
            src = 3 - src
            if context < LONG or i == len(modes) - 1:
                self.cancel(request_id)
        return rows

    def move(self, request_id: int, mode: str | None, src: int) -> dict[str, Any]:
        """Move the request to the other worker. Returns the row."""
        from mellmpi.scheduler import MoveProposal

        warm = self.tokens[request_id] + WARM_UP_TOKENS
        self.until(lambda: self.tokens[request_id] >= warm)
        self.started = self.ended = None
        self.moves = [MoveProposal(request_id, 3 - src, "bench", mode)]
        self.until(lambda: self.ended is not None)
        (began_s, started), (ended_s, ended) = self.started, self.ended
        known = self.tokens[request_id]
        self.until(lambda: self.tokens[request_id] > known)
        return {
            "asked": mode or "chosen",
            "mode": started.mode,
            "src": src,
            "dst": 3 - src,
            "request": request_id,
            "start": started.start,
            "began_s": began_s,
            "took_s": ended_s - began_s,
            "predicted_s": started.predicted_s,
            "num_bytes": ended.num_bytes,
            "transfer_s": ended.transfer_s,
            "outcome": ended.outcome,
        }


def lead(transport: Any, directory: Path, job: dict[str, Any]) -> None:
    """Run rank 0: all contexts in all modes; the first rounds only train the estimates."""
    from mellmpi.scheduler import WorkerState

    mover = Mover(transport)
    ledger = mover.scheduler.registry.ledger
    mover.until(lambda: len(ledger.workers(WorkerState.ACTIVE)) == 2)
    others = [(mover.decoded(w), w) for w in job["crowded"] for _ in range(job["others"])]
    for context in (512, 2048) * 2:
        mover.round(context, ["transfer", "recompute", "split"])
    rows = []
    for context in job["contexts"]:
        for repeat in range(job["repeats"]):
            if (rate := job["rates"].get(str(repeat))) is not None:
                subprocess.run([str(HERE / "two_hosts.sh"), "rate", rate], check=True)
            others = [(mover.kept_small(r, w), w) for r, w in others]
            # The order rotates, so that each mode is used in both directions.
            first = repeat % len(job["modes"])
            rows += mover.round(context, job["modes"][first:] + job["modes"][:first])
    (directory / "rows.json").write_text(json.dumps(rows))
    mover.loop.stop()


def main() -> None:
    from mellmpi.config import Config
    from mellmpi.runtime.connect import measure
    from mellmpi.transport.mpi import MpiJob

    directory, job = Path(sys.argv[1]), MpiJob()
    options = Config().transport
    try:
        transport = job.connect(options.idle_poll_s, False, options.checksums)
        measure(transport, job.hosts)
        if job.rank:
            work(transport, directory)
        else:
            lead(transport, directory, json.loads((directory / "job.json").read_text()))
        job.finish()
    except BaseException:
        import traceback

        traceback.print_exc()
        job.abort(1)


if __name__ == "__main__":
    main()
