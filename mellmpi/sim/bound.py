"""The load of a simulation, and the lower bound on the number of workers that can hold it."""

from dataclasses import dataclass

import numpy as np

from mellmpi.workload import Workload

SAMPLE_S = 0.5  # between two samples of the memory in use


@dataclass(frozen=True)
class Load:
    """Requests, with times in whole decode steps; without those that no worker can hold."""

    rate: float  # decode steps per second
    capacity: int  # KV bytes per worker
    token_bytes: dict[str, int]  # KV of one position, by model
    models: tuple[str, ...]  # of each request
    arrivals: np.ndarray  # int64 [requests], steps
    prompts: np.ndarray  # int64 [requests], tokens
    outputs: np.ndarray  # int64 [requests], tokens
    final_bytes: np.ndarray  # int64 [requests]: KV of prompt and output
    samples: np.ndarray  # int64 [samples], steps, from the first to the last arrival
    bound: np.ndarray  # int64 [samples], workers: ceil(live KV bytes / capacity)
    dropped: int  # requests

    @property
    def peak_live(self) -> int:
        """Largest number of requests in progress at once, if none ever waits."""
        changes = np.concatenate([self.arrivals * 2 + 1, (self.arrivals + self.outputs) * 2])
        signs = np.repeat([1, -1], len(self.arrivals))
        return int(np.cumsum(signs[np.argsort(changes, kind="stable")]).max())


def make_load(
    workload: Workload,
    token_bytes: dict[str, int],
    capacity: int,
    rate: float,
    block_sizes: dict[str, int] | None = None,
) -> Load:
    """Build the load of a simulation from a workload.

    token_bytes  KV bytes of one position, by model; if only one is given, it is that of all models
    rate         decode steps per second
    block_sizes  tokens per block, by model; None: KV is not held in blocks
    ValueError if the trace has a model without a size, or no request fits in a worker.
    """
    models = _models(workload, token_bytes)
    sizes = np.array([token_bytes[m] for m in models], np.int64)
    tokens = workload.prompt_tokens + workload.output_tokens
    blocks = np.array([(block_sizes or {}).get(m, 1) for m in models], np.int64)
    fits = -(-tokens // blocks) <= capacity // (sizes * blocks)
    if not fits.any():
        raise ValueError(
            f"no request of the trace fits in {capacity} bytes of KV cache; give --gpu-kv-gib more"
        )
    arrivals = np.rint(workload.arrival_s[fits] * rate).astype(np.int64)
    prompts, outputs = workload.prompt_tokens[fits], workload.output_tokens[fits]
    samples = _samples(arrivals, rate)
    live = live_bytes(arrivals, prompts, outputs, sizes[fits], samples)
    return Load(
        rate,
        capacity,
        token_bytes,
        tuple(m for m, fit in zip(models, fits, strict=True) if fit),
        arrivals,
        prompts,
        outputs,
        (tokens * sizes)[fits],
        samples,
        -(-live // capacity),
        workload.dropped + int((~fits).sum()),
    )


def _models(workload: Workload, token_bytes: dict[str, int]) -> list[str]:
    """Return the model of each request. ValueError names a model without a size."""
    if len(token_bytes) > 1 and (unknown := sorted(set(workload.model) - token_bytes.keys())):
        raise ValueError(
            f"the trace has requests of the model {unknown[0]!r}; give its size, too: "
            f"--kv-bytes-per-token {unknown[0] or 'NAME'}=N,…"
        )
    default = next(iter(token_bytes))
    return [m if m in token_bytes else default for m in workload.model]


def _samples(arrivals: np.ndarray, rate: float) -> np.ndarray:
    """Return steps every `SAMPLE_S` from the first to the last arrival. int64 [samples]."""
    span_s = (arrivals[-1] - arrivals[0]) / rate
    times_s = np.arange(int(span_s / SAMPLE_S) + 1) * SAMPLE_S
    return np.asarray(arrivals[0] + np.floor(times_s * rate + 1e-6).astype(np.int64))


def mean_context_bytes(workload: Workload, token_bytes: dict[str, int]) -> float:
    """Mean KV bytes of a decoding request, averaged over all decode steps of the workload."""
    default = next(iter(token_bytes.values()))
    sizes = np.array([token_bytes.get(m, default) for m in workload.model], np.int64)
    held = sizes * (workload.prompt_tokens + workload.output_tokens / 2)
    return float(np.average(held, weights=workload.output_tokens))


def live_bytes(
    arrivals: np.ndarray,
    prompts: np.ndarray,
    outputs: np.ndarray,
    sizes: np.ndarray,
    samples: np.ndarray,
) -> np.ndarray:
    """KV bytes of all requests between arrival and end, if none ever waits. int64 [samples].

    A request holds prompt + (step - arrival) tokens, so the sum is linear between events.
    """
    ends = arrivals + outputs
    begins, stops = np.searchsorted(samples, arrivals), np.searchsorted(samples, ends)
    fixed, growth = np.zeros(len(samples) + 1, np.int64), np.zeros(len(samples) + 1, np.int64)
    for at, sign in ((begins, 1), (stops, -1)):
        np.add.at(fixed, at, sign * sizes * (prompts - arrivals))
        np.add.at(growth, at, sign * sizes)
    return np.asarray(np.cumsum(fixed)[:-1] + np.cumsum(growth)[:-1] * samples)
