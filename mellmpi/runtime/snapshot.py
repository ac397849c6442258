"""The state of the whole job at one moment, as plain data for JSON: what people watch.

A snapshot is built only while somebody watches; its cost grows with workers and live requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mellmpi.scheduler import ClusterScheduler, WorkerState
from mellmpi.telemetry import Recent

LISTED = 64  # requests of one worker, the largest ones
QUEUED = 20  # waiting requests that are listed
SHOWN = {"parking": "parked", "held": "draining", "held_parked": "parked"}  # other states by name
STATES = {s.value: SHOWN.get(s.name.lower(), s.name.lower()) for s in WorkerState}


@dataclass(frozen=True)
class JobDescription:
    """What does not change while the job runs."""

    version: str
    policy: str
    models: Sequence[str]  # names that requests use
    hosts: Sequence[str]  # by rank
    start_s: float  # of the clock of `now`


class Snapshots:
    """Builds snapshots; only reads what it is given."""

    def __init__(self, scheduler: ClusterScheduler, recent: Recent, job: JobDescription):
        self._scheduler, self._recent, self._job = scheduler, recent, job

    def take(self, now: float, unix_s: float, problem: str = "") -> dict[str, Any]:
        """The job at `now`; `GET /v1/cluster` documents the fields.

        now      seconds, of the clock of the scheduler's events
        unix_s   the same moment, seconds since 1970
        problem  why the job takes no requests, or ""
        """
        recent, job = self._recent, self._job
        problem = problem or self._problem()
        return {
            "time": unix_s,
            "uptime_s": now - job.start_s,
            "version": job.version,
            "policy": job.policy,
            "models": list(job.models),
            "ready": not problem,
            "reason": problem,
            "workers": self._workers(now),
            "waiting": self._waiting(now),
            "migrations": self._migrations(unix_s - now),
            "rates": recent.rates(now),
            "ttft_ms": recent.ttft.percentiles_ms(now),
            "tpot_ms": recent.tpot.percentiles_ms(now),
            "totals": recent.totals(now),
        }

    def _problem(self) -> str:
        states = self._scheduler.registry.ledger.state[1:].tolist()
        if any(state not in (WorkerState.STARTING, WorkerState.LOST) for state in states):
            return ""
        return "workers are starting" if WorkerState.STARTING in states else "no worker is left"

    def _workers(self, now: float) -> list[dict[str, Any]]:
        ledger, hosts = self._scheduler.registry.ledger, self._job.hosts
        requests, used = self._requests()
        workers = []
        for worker in range(1, len(ledger.state)):
            step_ms, tokens_per_s = self._recent.worker(worker, now)
            listed = requests.get(worker, [])
            workers.append(
                {
                    "id": worker,
                    "host": hosts[worker] if worker < len(hosts) else "",
                    "state": STATES[int(ledger.state[worker])],
                    "held": bool(ledger.held[worker]),
                    "kv_bytes": int(used[worker]),
                    "kv_capacity": int(ledger.capacity[worker]),
                    "step_ms": step_ms,
                    "tokens_per_s": tokens_per_s,
                    "requests": listed[:LISTED],
                    "num_requests": len(listed),
                }
            )
        return workers

    def _requests(self) -> tuple[dict[int, list[dict[str, Any]]], np.ndarray]:
        """Requests of each worker, largest first; int64 [workers + 1]: bytes of their KV."""
        columns = self._scheduler.registry.view.requests
        rows = np.flatnonzero(columns.worker)
        kv_bytes, workers = columns.kv_bytes(rows), columns.worker[rows]
        used = np.zeros(len(self._scheduler.registry.ledger.state), np.int64)
        np.add.at(used, workers, kv_bytes)
        order = np.argsort(-kv_bytes, kind="stable")
        rows = rows[order]
        table = (
            workers[order],
            columns.request_id[rows],
            columns.movable[rows],
            kv_bytes[order],
            columns.num_prompt[rows],
            columns.num_tokens[rows] - columns.num_prompt[rows],
        )
        found: dict[int, list[dict[str, Any]]] = {}
        for worker, id, stays, size, num_prompt, num_outputs in zip(
            *(column.tolist() for column in table), strict=True
        ):
            found.setdefault(worker, []).append(
                {
                    "id": id,
                    "state": "running" if stays else "moving",
                    "kv_bytes": size,
                    "prompt_tokens": num_prompt,
                    "output_tokens": num_outputs,
                    "to": None if stays else self._destination(id),
                }
            )
        return found, used

    def _destination(self, request_id: int) -> int | None:
        offer = self._scheduler.records[request_id].offer
        return None if offer is None else offer.dst

    def _waiting(self, now: float) -> dict[str, Any]:
        queue = self._scheduler.queue
        requests = [
            {
                "id": waiting.record.request.id,
                "prompt_tokens": len(waiting.record.request.prompt),
                "waited_s": now - waiting.since_s,
            }
            for waiting in queue.first(QUEUED)
        ]
        oldest_s = max((request["waited_s"] for request in requests), default=0.0)
        return {"count": len(queue), "oldest_s": oldest_s, "requests": requests}

    def _migrations(self, to_unix_s: float) -> list[dict[str, Any]]:
        """The newest migrations that have ended, newest first."""
        return [
            {
                "time": move.ended_s + to_unix_s,
                "request": move.ended.request_id,
                "src": move.ended.src,
                "dst": move.ended.dst,
                "mode": move.ended.mode,
                "reason": move.started.reason,
                "bytes": move.ended.num_bytes,
                "predicted_s": move.started.predicted_s,
                "seconds": move.seconds,
                "outcome": move.ended.outcome,
            }
            for move in reversed(self._recent.moves)
        ]
