"""A description of a trace in one line, and a check whether its times are plausible."""

from mellmpi.workload.formats import UNITS, Format
from mellmpi.workload.requests import Workload
from mellmpi.workload.rows import SEPARATORS, TraceFile

FASTEST = 200.0  # requests/s, mean of the fastest plausible trace
FASTEST_TOKENS = 5e6  # tokens/s, prompts and outputs together, mean of the fastest one


def describe(file: TraceFile, form: Format, workload: Workload) -> str:
    """Return file, format, unit of times, requests and span; a warning if the unit looks wrong."""
    times = f"times in {form.unit}" if form.unit else "times are dates"
    separated = f", separated by {SEPARATORS[file.separator]}" if file.separator != "," else ""
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0])
    rate = f"{_rate(workload):,.0f}" if _rate(workload) >= 100 else f"{_rate(workload):.3g}"
    within = f" in {_span(span_s)} ({rate} requests/s)" if span_s else " at once"
    failed = f", {workload.dropped:,} failed left out" if workload.dropped else ""
    return (
        f"{file.path}: {form.name} format{separated}, {times}, {len(workload):,} requests"
        f"{within}{failed}{_warning(form, workload)}"
    )


def plausible_unit(form: Format, workload: Workload) -> str | None:
    """Return the unit in which the times of a trace are plausible, preferably its format's unit.

    A load is plausible if its mean is between `form.slowest` (1/300; Mooncake and Bailian 1/10,
    BurstGPT 0) and 200 requests/s, and at most 5 million tokens/s. None if no unit is plausible
    (for example because all requests arrive at once), and if times are dates.
    """
    if form.unit is None:
        return None
    tokens = float(workload.prompt_tokens.mean() + workload.output_tokens.mean())
    for unit in (form.unit, *UNITS):
        rate = _rate(workload) * UNITS[unit] / UNITS[form.unit]
        if form.slowest <= rate <= FASTEST and rate * tokens <= FASTEST_TOKENS:
            return unit
    return None


def _warning(form: Format, workload: Workload) -> str:
    unit = plausible_unit(form, workload)
    if unit is None or form.unit is None or unit == form.unit:
        return ""
    scale = UNITS[unit] / UNITS[form.unit]
    return f"; that is an unlikely load: if the times are in {unit}, add --rate-scale {scale:.10g}"


def _rate(workload: Workload) -> float:
    """Mean requests/s; 0 if all requests arrive at once."""
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0])
    return (len(workload) - 1) / span_s if span_s else 0.0


def _span(seconds: float) -> str:
    for unit, size_s in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.1f} {unit}"
    return f"{seconds:.3g} s"
