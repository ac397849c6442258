"""Requests that move when and how they are told to, between two real workers: one job of 3 ranks.

    mpirun -n 3 … python bench/moving.py DIRECTORY

DIRECTORY holds `job.json` (see `run`) and the model; rank 0 leaves `rows.json` there, a row a move,
and every worker the times of its tokens. All ranks are on one machine: they share its clock.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHAPE = {  # much KV (32 KiB a token in float32) for little to compute
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 64,
    "vocab_size": 512,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FLAGS = ["--mca", "pml", "ob1", "--with-ft", "ulfm"]
LINKS = {  # flags of mpirun
    "shm": [*FLAGS, "--mca", "btl", "sm,self,tcp", "--map-by", ":OVERSUBSCRIBE"],
    # Rank 0 and worker 1 on the first host, worker 2 on the second.
    "1gbit": [*FLAGS, "--mca", "btl", "tcp,self", "-host", "10.78.0.1:2,10.78.0.2:1"],
    "10gbit": [*FLAGS, "--mca", "btl", "tcp,self", "-host", "10.78.0.1:2,10.78.0.2:1"],
}
TOKEN_BYTES = 2 * 4 * 16 * 64 * 4  # of KV, in float32
ARENA_TOKENS = 20_000
LONG = 1024  # tokens: a request that hardly grows while it is measured
OTHERS_TOKENS = 800  # at the most, of a request that is only decoded meanwhile
SETTLE_TOKENS = 12  # before each move: they say what a step takes
LIMIT_S = 60.0  # for anything to happen

# --- in the benchmark's own process --------------------------------------------------------------


def run(
    link: str,
    contexts: list[int],
    modes: list[str | None],
    repeats: int,
    others: int = 0,
    rates: dict[int, str] | None = None,
    crowded: tuple[int, ...] = (1, 2),
) -> list[dict[str, Any]]:
    """One row a move, over this link; modes in turn, since the load of the host changes.

    others   requests that each crowded worker decodes meanwhile
    rates    of the link between the two hosts from this repeat on, such as "1gbit"
    """
    job = {
        "contexts": contexts,
        "modes": modes,
        "repeats": repeats,
        "others": others,
        "crowded": crowded,
        "rates": rates or {},
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(SHAPE))
        (directory / "job.json").write_text(json.dumps(job))
        program = ["-n", "3", sys.executable, str(Path(__file__).resolve()), name]
        if link == "shm":
            mpirun = [
                str(Path(sys.executable).with_name("mpirun")),
                "--allow-run-as-root",
                "--bind-to",
                "none",
            ]
        else:
            subprocess.run([str(HERE / "two_hosts.sh"), "up", link], check=True)
            mpirun = ["bash", str(HERE / "two_hosts.sh"), "mpirun"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
        try:
            subprocess.run(
                ["timeout", "-k", "5", "1800", *mpirun, *LINKS[link], *program],
                env=environment,
                check=True,
            )
        finally:
            if link != "shm":
                subprocess.run([str(HERE / "two_hosts.sh"), "down"], check=True)
        rows: list[dict[str, Any]] = json.loads((directory / "rows.json").read_text())
        stamps = {w: json.loads((directory / f"tokens{w}.json").read_text()) for w in (1, 2)}
    for row in rows:
        row |= _pause(row, stamps)
        row |= {f"others_{end}": _others(row, stamps, row[end]) for end in ("src", "dst")}
    return rows


def _pause(row: dict[str, Any], stamps: dict[int, list[Any]]) -> dict[str, float]:
    """Seconds from the last token of the source to the first of the destination, and of a step."""

    def of(worker: int) -> list[float]:
        return [at for request, at in stamps[worker] if request == row["request"]]

    first = min(at for at in of(row["dst"]) if at > row["began_s"])
    before = [at for at in of(row["src"]) if at < first]
    steps = [b - a for a, b in pairwise(before)]
    step_s = statistics.median(steps[-20:]) if steps else 0.0
    return {"pause_s": first - before[-1], "step_s": step_s}


def _others(row: dict[str, Any], stamps: dict[int, list[Any]], worker: int) -> list[float]:
    """Seconds a token of all others there: before the move, and during it; empty: no others.

    Before: since the request that moves had its first token, prefill being over.
    """
    ready_s = min(at for request, at in stamps[row["src"]] if request == row["request"])
    times = sorted({at for request, at in stamps[worker] if request != row["request"]})
    steps = [(a, b - a) for a, b in pairwise(times)]
    began_s, ended_s = row["began_s"], row["began_s"] + row["took_s"]
    before = [step_s for at, step_s in steps if ready_s <= at < began_s][-SETTLE_TOKENS:]
    during = [step_s for at, step_s in steps if began_s <= at < ended_s]
    return [statistics.mean(before), statistics.mean(during)] if before and during else []


# --- on the ranks --------------------------------------------------------------------------------


class Stamped:
    """An engine that notes when each token was there."""

    def __init__(self, engine: Any, stamps: list[tuple[int, float]]):
        self._engine, self._stamps = engine, stamps
        self.arena, self.models, self.release = engine.arena, engine.models, engine.release

    def execute(self, plan: Any) -> Any:
        result = self._engine.execute(plan)
        now = time.perf_counter()
        self._stamps += [(c.request_id, now) for c in plan.chunks if c.sampling is not None]
        return result


def work(transport: Any, directory: Path) -> None:
    """A worker, until it is told to stop."""
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
        engine.arena.elements.zero_()  # its pages are there, as in a worker that has served
        return Stamped(engine, stamps)

    worker = Worker(transport, build, BatchConfig(), cache)
    worker.start()
    while not worker.stopped:
        if not worker.turn():
            worker.wait()
    (directory / f"tokens{transport.worker}.json").write_text(json.dumps(stamps))


class Mover:
    """Rank 0: a front, a policy and an observer in one, and the real loop between them."""

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

    # As a front.

    def inbox(self, now: float) -> list[Any]:
        inbox, self._inbox = self._inbox, []
        return inbox

    def due_s(self, now: float) -> float:
        return 1.0

    def deliver(self, command: Any) -> None:
        self.tokens[command.request_id] += len(command.tokens)

    # As a policy and an observer.

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

    # What happens.

    def until(self, condition: Callable[[], Any]) -> None:
        stop_s = time.perf_counter() + LIMIT_S
        while not condition():
            assert time.perf_counter() < stop_s, "nothing happens"
            if not self.loop.turn(self):
                self.loop.wait(self)

    def submit(self, num_prompt: int, worker: int, max_tokens: int) -> int:
        from mellmpi.protocol import Request, Sampling, Submit

        self.next_id += 1
        prompt = tuple((7 * i + self.next_id) % SHAPE["vocab_size"] for i in range(num_prompt))
        sampling = Sampling(max_tokens, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, (), None)
        self.place_at, self.tokens[self.next_id] = worker, 0
        model = next(iter(self.scheduler.registry.models))
        self._inbox.append(Submit(Request(self.next_id, model, prompt, sampling, None)))
        return self.next_id

    def cancel(self, request_id: int) -> None:
        from mellmpi.protocol import Cancel

        self._inbox.append(Cancel(request_id, "gone"))
        self.until(lambda: request_id not in self.scheduler.records)

    def kept_small(self, request_id: int, worker: int) -> int:
        """Another in its place once it has grown: or the arena would be full before long."""
        if self.tokens[request_id] < OTHERS_TOKENS:
            return request_id
        self.cancel(request_id)
        return self.decoded(worker)

    def decoded(self, worker: int) -> int:
        """Another request that this worker decodes meanwhile. It is there: others may follow."""
        request_id = self.submit(64, worker, max_tokens=10**4)
        self.until(lambda: self.tokens[request_id])
        return request_id

    def round(self, context: int, modes: list[str | None]) -> list[dict[str, Any]]:
        """Each way once, from worker 1 to worker 2 and back: a row each.

        A long request takes them all: it hardly grows meanwhile, and prefilling takes its time.
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
        """MoveProposal it to the other worker; the row."""
        from mellmpi.scheduler import MoveProposal

        settled = self.tokens[request_id] + SETTLE_TOKENS
        self.until(lambda: self.tokens[request_id] >= settled)
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
    """Rank 0: every context, the ways in turn; the first two rounds only teach the estimates."""
    from mellmpi.scheduler import WorkerState

    mover = Mover(transport)
    ledger = mover.scheduler.registry.ledger
    mover.until(lambda: len(ledger.workers(WorkerState.ACTIVE)) == 2)
    others = [(mover.decoded(w), w) for w in job["crowded"] for _ in range(job["others"])]
    for context in (512, 2048) * 2:
        mover.round(context, ["transfer", "recompute", "split"])
    rows = []
    for context in job["contexts"]:
        for turn in range(job["repeats"]):
            if (rate := job["rates"].get(str(turn))) is not None:
                subprocess.run([str(HERE / "two_hosts.sh"), "rate", rate], check=True)
            others = [(mover.kept_small(r, w), w) for r, w in others]
            # Another one begins: each way goes in both directions.
            first = turn % len(job["modes"])
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
