"""Formats of published traces: the meaning of their columns, and how cells are parsed."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeVar

from mellmpi.workload.requests import MAX_TOKENS

T = TypeVar("T")
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
DATE = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d)(?:(:\d\d)(?:\.(\d{0,9}))?)?\s?(Z|[+-]\d\d(?::?\d\d)?)?",
    re.ASCII | re.IGNORECASE,
)
UNITS = {"seconds": 1, "milliseconds": 1000, "microseconds": 10**6, "nanoseconds": 10**9}


@lru_cache(maxsize=1000)
def column_name(text: str) -> str:
    """Return the key of a column: its name in lower case, without surrounding spaces."""
    return text.strip().casefold()


@dataclass(frozen=True)
class Format:
    """Column names of one publisher's files, as the publisher spells them; "": no such column."""

    name: str
    arrival: str
    prompt: str  # tokens
    output: str  # tokens
    unit: str | None  # of arrivals, one of UNITS; None: arrivals are dates
    model: str = ""
    session: str = ""
    also: str = ""  # another column that every file has
    without: str = ""  # a column that no file has
    zero_is_failure: bool = False  # a request with 0 tokens has failed
    from_first: bool = True  # times are relative to the first row
    slowest: float = 1 / 300  # requests/s, mean of the slowest plausible trace in this format

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that every file has."""
        return tuple(filter(None, (self.arrival, self.prompt, self.output, self.also)))

    def fits(self, names: Collection[str]) -> bool:
        """Whether a file with these columns, as `column_name` gives them, has this format."""
        return not (self.without and self.without in names) and not self.missing(names)

    def missing(self, names: Collection[str]) -> list[str]:
        """Required columns that a file with these columns lacks."""
        return [name for name in self.needs if column_name(name) not in names]

    def arrival_s(self, columns: Mapping[str, Any]) -> float:
        """Arrival time in seconds: since 2000 for dates, else since the origin of the trace."""
        if self.unit is None:
            what = "a date and time such as 2024-05-10 00:00:00.009930+00:00"
            return _read(columns, self.arrival, what, _date_s)
        time = _read(columns, self.arrival, f"a time in {self.unit}", _number)
        if time < 0:
            raise _wrong(columns, self.arrival, "a time is 0 or more")
        return time / UNITS[self.unit]

    def tokens(self, columns: Mapping[str, Any], name: str) -> int:
        """Number of tokens: at least 1, or 0 for a failed request. ValueError names the column."""
        tokens = _read(columns, name, "a whole number of tokens", _whole)
        if tokens < (0 if self.zero_is_failure else 1):
            raise _wrong(columns, name, "a request has at least one prompt and one output token")
        if tokens > MAX_TOKENS:
            raise _wrong(
                columns, name, f"prompt and output have at most {MAX_TOKENS:,} tokens each"
            )
        return tokens

    def label(self, columns: Mapping[str, Any], name: str) -> str:
        """Name of a model or a session; "" if the row has none."""
        if not name or columns.get(column_name(name)) in (None, ""):
            return ""
        return _read(columns, name, "a name", _text)


FORMATS = (
    Format(
        "uniform",
        "arrival_s",
        "prompt_tokens",
        "output_tokens",
        "seconds",
        model="model",
        session="session",
        from_first=False,
    ),
    # github.com/Azure/AzurePublicDataset: AzureLLMInferenceDataset2023.md, …2024.md (dates with a
    # zone), AzureLMMInferenceDataset2025.md (dates with T and Z, a column NumImages)
    Format("Azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", None),
    # github.com/HPMLL/BurstGPT: BurstGPT_1, _2, and _3 with the columns Session ID, Elapsed time
    Format(
        "BurstGPT",
        "Timestamp",
        "Request tokens",
        "Response tokens",
        "seconds",
        model="Model",
        session="Session ID",
        zero_is_failure=True,
        slowest=0,
    ),
    # github.com/kvcache-ai/Mooncake: FAST25-release
    Format(
        "Mooncake",
        "timestamp",
        "input_length",
        "output_length",
        "milliseconds",
        without="chat_id",
        slowest=1 / 10,
    ),
    # github.com/alibaba-edu/qwen-bailian-usagetraces-anon
    Format(
        "Bailian",
        "timestamp",
        "input_length",
        "output_length",
        "seconds",
        also="chat_id",
        slowest=1 / 10,
    ),
    # github.com/microsoft/vidur: data/processed_traces/splitwise_conv.csv
    Format("Vidur", "arrived_at", "num_prefill_tokens", "num_decode_tokens", "seconds"),
)


def recognise(names: Collection[str]) -> Format:
    """Return the format of a file with these columns. ValueError lists the known formats."""
    fits = [form for form in FORMATS if form.fits(names)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        both = " and of ".join(form.name for form in fits)
        raise ValueError(f"columns of {both}: remove those of one format")
    nearest = min(FORMATS, key=lambda form: len(form.missing(names)))
    missing = nearest.missing(names)
    lacks = f"; {nearest.name} without {missing[0]}" if len(missing) == 1 else ""
    known = "; ".join(f"{form.name}: {', '.join(form.needs)}" for form in FORMATS)
    raise ValueError(f"unknown columns ({', '.join(names)[:200]!r}{lacks}). Known formats: {known}")


def _read(columns: Mapping[str, Any], name: str, what: str, parse: Callable[[Any], T]) -> T:
    """Parse a cell. ValueError names the column and the expected content."""
    value = columns.get(column_name(name))
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{name} is missing; {what} is expected")
    try:
        return parse(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise _wrong(columns, name, f"{what} is expected") from error


def _wrong(columns: Mapping[str, Any], name: str, expected: str) -> ValueError:
    return ValueError(f"{name} is {_shown(columns[column_name(name)])}; {expected}")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(value)
    if isinstance(value, str) and ("_" in value or not value.isascii()):
        raise ValueError(value)  # Python accepts 1_000 and digits of any script
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _whole(value: Any) -> int:
    number = _number(value)
    if not number.is_integer():
        raise ValueError(value)
    return int(number)


def _date_s(value: Any) -> float:
    """Seconds since 2000. A date without a zone is UTC; fractions have up to nine digits."""
    if (found := DATE.fullmatch(value.strip() if isinstance(value, str) else "")) is None:
        raise ValueError(value)
    day, clock, seconds, decimals, zone = found.groups()
    whole = datetime.fromisoformat(f"{day}T{clock}{seconds or ''}{(zone or 'Z').upper()}")
    return (whole - EPOCH).total_seconds() + (float(f"0.{decimals}") if decimals else 0.0)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(value)
    text = str(value).strip()
    text.encode()  # raises for a lone surrogate: JSON can contain it, UTF-8 cannot
    return text


def _shown(value: Any) -> str:
    """Return a cell for an error message: one line, at most 60 characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
