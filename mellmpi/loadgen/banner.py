"""The table of a run's figures as `vllm bench serve` prints it: 50 columns, the same rows."""

from collections.abc import Iterator
from typing import Any

from mellmpi.loadgen.options import BenchOptions

WIDTH = 50
HEADINGS = {  # metric -> heading of its section
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def banner(found: dict[str, Any], options: BenchOptions) -> str:
    """Return the table. `found` has the figures of `figures`."""
    return "\n".join([*_totals(found, options), *_sections(found, options), "=" * WIDTH]) + "\n"


def _totals(found: dict[str, Any], options: BenchOptions) -> Iterator[str]:
    yield f"{' Serving Benchmark Result ':=^{WIDTH}}"
    yield _row("Successful requests:", found["completed"])
    yield _row("Failed requests:", found["failed"])
    if found["interrupted"]:
        yield _row("Interrupted requests:", found["interrupted"])
    if options.max_concurrency is not None:
        yield _row("Maximum request concurrency:", options.max_concurrency)
    if options.request_rate != float("inf"):
        yield _row("Request rate configured (RPS):", float(options.request_rate))
    yield _row("Benchmark duration (s):", found["duration"])
    yield _row("Total input tokens:", found["total_input_tokens"])
    yield _row("Total generated tokens:", found["total_output_tokens"])
    yield _row("Request throughput (req/s):", found["request_throughput"])
    if options.goodput:
        yield _row("Request goodput (req/s):", found["request_goodput"])
    yield _row("Output token throughput (tok/s):", found["output_throughput"])
    yield _row("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"])
    yield _row("Peak concurrent requests:", found["max_concurrent_requests"])
    yield _row("Total token throughput (tok/s):", found["total_token_throughput"])


def _sections(found: dict[str, Any], options: BenchOptions) -> Iterator[str]:
    for metric in options.percentile_metrics:
        name = metric.upper()
        yield f"{HEADINGS[metric]:-^{WIDTH}}"
        yield _row(f"Mean {name} (ms):", found[f"mean_{metric}_ms"])
        yield _row(f"Median {name} (ms):", found[f"median_{metric}_ms"])
        for percentile in options.metric_percentiles:
            value = found[f"p{percentile:g}_{metric}_ms"]
            yield _row(f"P{percentile:g} {name} (ms):", value)


def _row(name: str, value: float) -> str:
    shown = f"{value:<10.2f}" if isinstance(value, float) else f"{value:<10}"
    return f"{name:<40} {shown}"
