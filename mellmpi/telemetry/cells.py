"""Figures of requests by model and worker, as the metrics of vLLM have them by engine."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mellmpi.telemetry.histogram import ITL_S, LATENCY_S, TOKENS, TTFT_S, Histogram

QUEUE = 0  # in place of a worker: requests that wait on rank 0
Rows = list[tuple[tuple[str, ...], Any]]
"""Samples of one metric: (label values, number), or (label values, `Histogram.read()`)."""


@dataclass(slots=True)
class Cell:
    """One model on one worker, or in the queue."""

    prompt_tokens: int = 0  # of requests placed here first
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # tokens of prompts that were looked up in the prefix cache
    prefix_hits: int = 0  # of these, found
    finished: Counter[str] = field(default_factory=Counter)  # by reason
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_S))
    itl: Histogram = field(default_factory=lambda: Histogram(ITL_S))
    e2e: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    queue_time: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    prompts: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    outputs: Histogram = field(default_factory=lambda: Histogram(TOKENS))


FINISHED = ("stop", "length", "abort", "error")
METRICS: dict[str, Callable[[Cell], Any]] = {
    "prompt_tokens": lambda cell: cell.prompt_tokens,
    "generation_tokens": lambda cell: cell.generation_tokens,
    "num_preemptions": lambda cell: cell.preemptions,
    "prefix_cache_queries": lambda cell: cell.prefix_queries,
    "prefix_cache_hits": lambda cell: cell.prefix_hits,
    "time_to_first_token_seconds": lambda cell: cell.ttft.read(),
    "inter_token_latency_seconds": lambda cell: cell.itl.read(),
    "e2e_request_latency_seconds": lambda cell: cell.e2e.read(),
    "request_queue_time_seconds": lambda cell: cell.queue_time.read(),
    "request_prompt_tokens": lambda cell: cell.prompts.read(),
    "request_generation_tokens": lambda cell: cell.outputs.read(),
}


class Cells:
    """All cells. Models that no worker has announced share the name "", however many there are."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, int], Cell] = {}  # by model and worker
        self._models: set[str] = set()

    def announce(self, worker: int, models: Iterable[str]) -> None:
        """The worker hosts these models: their counters begin at 0."""
        for model in models:
            self._models.add(model)
            self.of(model, worker)
            self.of(model, QUEUE)

    def known(self, model: str) -> str:
        """The model's name; "" if no worker has announced it."""
        return model if model in self._models else ""

    def of(self, model: str, worker: int) -> Cell:
        if (cell := self._cells.get((model, worker))) is None:
            cell = self._cells[model, worker] = Cell()
        return cell

    def all(self) -> Iterable[Cell]:
        return self._cells.values()

    def rows(self, owners: Counter[tuple[str, int]], usage: dict[int, float]) -> dict[str, Rows]:
        """{metric: samples}, with the labels model and worker.

        owners  (model, worker) -> live requests there
        usage   worker -> share of its KV arena in use, for all its models together
        """
        found: dict[str, Rows] = {name: [] for name in METRICS}
        for (model, worker), cell in sorted(self._cells.items()):
            labels = model, str(worker)
            for name, read in METRICS.items():
                found[name].append((labels, read(cell)))
            reasons = {**dict.fromkeys(FINISHED, 0), **cell.finished}
            for reason, count in reasons.items():
                found.setdefault("request_success", []).append(((*labels, reason), count))
            here = "num_requests_waiting" if worker == QUEUE else "num_requests_running"
            found.setdefault(here, []).append((labels, owners[model, worker]))
            if worker in usage:
                found.setdefault("kv_cache_usage_perc", []).append((labels, usage[worker]))
        return found
