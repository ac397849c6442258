"""The table of metrics. Names and buckets are those of vLLM, so that its users' dashboards fit.

`engine` is the worker; engine 0 is rank 0, where requests wait.
"""

from dataclasses import dataclass

from mellmpi.telemetry.histogram import (
    ITL_S,
    LATENCY_S,
    MOVE_BYTES,
    MOVE_S,
    TOKENS,
    TTFT_S,
)

COUNTER, GAUGE = "counter", "gauge"
ENGINE = ("model_name", "engine")
MODE = ("model_name", "mode")


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. `kind` is COUNTER, GAUGE, or the upper bounds of a histogram's buckets."""

    help: str
    kind: str | tuple[float, ...]
    labels: tuple[str, ...]
    is_vllm: bool = False  # vLLM has a metric of this name and meaning


def _vllm(help: str, kind: str | tuple[float, ...], *labels: str) -> Family:
    return Family(help, kind, (*ENGINE, *labels), is_vllm=True)


FAMILIES = {  # counters are rendered with the suffix _total
    "num_requests_running": _vllm("Requests on a worker.", GAUGE),
    "num_requests_waiting": _vllm("Requests in the queue of rank 0.", GAUGE),
    "kv_cache_usage_perc": _vllm(
        "Share of the worker's KV cache in use, 0 to 1; all models of a worker share it.", GAUGE
    ),
    "prefix_cache_queries": _vllm("Tokens looked up in the prefix cache.", COUNTER),
    "prefix_cache_hits": _vllm("Tokens found in the prefix cache.", COUNTER),
    "num_preemptions": _vllm("Preempted requests.", COUNTER),
    "prompt_tokens": _vllm("Prompt tokens of placed requests.", COUNTER),
    "generation_tokens": _vllm("Output tokens.", COUNTER),
    "request_success": _vllm("Requests that have ended.", COUNTER, "finished_reason"),
    "time_to_first_token_seconds": _vllm("Arrival to first token.", TTFT_S),
    "inter_token_latency_seconds": _vllm("Gaps between outputs of one request.", ITL_S),
    "e2e_request_latency_seconds": _vllm("Arrival to last token.", LATENCY_S),
    "request_queue_time_seconds": _vllm("Arrival to first placement.", LATENCY_S),
    "request_prompt_tokens": _vllm("Prompt tokens of a completed request.", TOKENS),
    "request_generation_tokens": _vllm("Output tokens of a completed request.", TOKENS),
    "migrations": Family(
        "Migrations that have ended.",
        COUNTER,
        ("model_name", "src", "dst", "mode", "reason", "outcome"),
    ),
    "migration_seconds": Family("Decision to arrival of a moved request.", MOVE_S, MODE),
    "migration_predicted_seconds": Family("The same, as predicted.", MOVE_S, MODE),
    "migration_downtime_seconds": Family("Time without a token due to a move.", MOVE_S, MODE),
    "migration_bytes": Family("Bytes over the link of a moved request.", MOVE_BYTES, MODE),
    "link_bandwidth_bytes_per_second": Family(
        "Measured bandwidth between two hosts, or within one.", GAUGE, ("src", "dst", "path")
    ),
    "active_gpus": Family("Workers that hold their device.", GAUGE, ()),
    "gpu_seconds": Family("Device seconds of active workers since the first request.", COUNTER, ()),
    "gpu_seconds_all_on": Family("The same, if no worker were ever parked.", COUNTER, ()),
}
