"""A workload, arrival times and lengths of its requests, and a seeded generator."""

import math
from dataclasses import dataclass, replace

import numpy as np

MAX_TOKENS = 2**31 - 1  # of a prompt, and of an output
LONGEST_S = 366 * 86_400.0  # from the start of a trace to its last arrival


@dataclass(frozen=True)
class Workload:
    """One row per request, in the order of arrival."""

    arrival_s: np.ndarray  # float64 [requests], ascending
    prompt_tokens: np.ndarray  # int64 [requests], at least 1
    output_tokens: np.ndarray  # int64 [requests], at least 1
    model: tuple[str, ...]  # one per row, "" if the trace has none
    session: tuple[str, ...]  # one per row, "" if the trace has none
    dropped: int = 0  # rows of requests that failed in the traced system
    source: str = ""  # one line: file, format, unit of times, number of requests, span

    def __len__(self) -> int:
        return len(self.arrival_s)

    def faster(self, factor: float) -> "Workload":
        """Return the workload with `factor` times the arrival rate."""
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"--rate-scale must be over 0, not {factor}")
        if float(self.arrival_s.max(initial=0)) / factor > LONGEST_S:
            raise ValueError(
                f"--rate-scale {factor:g} makes requests arrive for over "
                f"{LONGEST_S / 86_400:.0f} days; give a larger one"
            )
        return replace(self, arrival_s=self.arrival_s / factor)

    def longer(self, factor: float) -> "Workload":
        """Return the workload with prompts and outputs `factor` times as long, at least 1 token."""
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"--length-scale must be over 0, not {factor}")
        longest = max(tokens.max(initial=0) for tokens in (self.prompt_tokens, self.output_tokens))
        if int(longest) * factor > MAX_TOKENS:
            raise ValueError(
                f"--length-scale {factor:g} makes a prompt or an output of over "
                f"{MAX_TOKENS:,} tokens; give a smaller one"
            )

        def scaled(tokens: np.ndarray) -> np.ndarray:
            return np.maximum(1, np.rint(tokens * factor)).astype(np.int64)

        return replace(
            self, prompt_tokens=scaled(self.prompt_tokens), output_tokens=scaled(self.output_tokens)
        )

    def first(self, count: int) -> "Workload":
        """Return the first `count` requests."""
        return replace(
            self,
            arrival_s=self.arrival_s[:count],
            prompt_tokens=self.prompt_tokens[:count],
            output_tokens=self.output_tokens[:count],
            model=self.model[:count],
            session=self.session[:count],
        )


def gamma(
    num_requests: int, rate: float, cv: float, prompt: float, output: float, seed: int
) -> Workload:
    """Generate arrivals with gamma distributed gaps, and lognormal lengths.

    rate            requests per second
    cv              coefficient of variation of the gaps; 1: Poisson arrivals
    prompt, output  mean lengths in tokens; the standard deviation equals the mean

    Raises ValueError unless all of them are over 0.
    """
    if num_requests < 1 or min(rate, cv, prompt, output) <= 0:
        raise ValueError("requests, rate, cv, prompt and output must be over 0")
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(1 / cv**2, cv**2 / rate, num_requests)
    sigma = math.sqrt(math.log(2))

    def lengths(mean: float) -> np.ndarray:
        samples = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, num_requests)
        return np.maximum(1, samples).astype(np.int64)

    nothing = ("",) * num_requests
    return Workload(np.cumsum(gaps), lengths(prompt), lengths(output), nothing, nothing)
