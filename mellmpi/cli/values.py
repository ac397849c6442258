"""Readers of flag values: text in, a checked value out; ValueError says what is allowed."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

LARGEST_TOKEN_BYTES = 2**30  # times the tokens of the longest request, it fits into 63 bits
SWITCHES = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


@dataclass(frozen=True)
class WholeNumber:
    """Reads whole numbers from `least` to `most`."""

    least: int
    most: int

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # not a number, or one with thousands of digits
            value = self.least - 1
        if not self.least <= value <= self.most:
            raise ValueError(f"{text!r:.60} is no whole number from {self.least} to {self.most}")
        return value


@dataclass(frozen=True)
class RealNumber:
    """Reads numbers from `least` to `most`."""

    least: float
    most: float

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not self.least <= value <= self.most:  # false for nan
            raise ValueError(f"{text!r:.60} is no number from {self.least:g} to {self.most:g}")
        return value


COUNT, NUMBER = WholeNumber(1, 2**31 - 1), WholeNumber(0, 2**31 - 1)
PORT = WholeNumber(0, 65535)
SEED, THREADS, GPUS = WholeNumber(0, 2**63 - 1), WholeNumber(1, 1024), WholeNumber(1, 100_000)
POSITIVE, SECONDS = RealNumber(1e-9, 1e9), RealNumber(0, 1e9)
TICK = RealNumber(1e-3, 1e9)  # seconds; a simulation with shorter ticks would not end
FRACTION, SHARE = RealNumber(0, 1), RealNumber(1e-9, 1)


def byte_size(text: str, most: int = 2**60) -> int:
    """A number of bytes, such as 512M, 1.5GiB or 2000000; K, M, G and T are powers of 1024.

    ValueError if it is below 1 or above `most`.
    """
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    factor = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(number[-1:], 1)
    try:
        size = int(float(number.rstrip("kmgt")) * factor)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r:.60} is no number of bytes (write 512M or 2G)") from error
    if not 1 <= size <= most:
        raise ValueError(f"{text!r:.60} is no number of bytes from 1 to {most}")
    return size


def sizes_by_model(text: str) -> dict[str, int]:
    """Bytes by model: "512K" is {"": 524288} (all models), "a=512K,b=128K" has two entries."""
    parts = [part.rpartition("=") for part in text.split(",")]
    return {name.strip(): byte_size(size, LARGEST_TOKEN_BYTES) for name, _, size in parts}


def profiles_by_model(text: str) -> dict[str, str]:
    """Model profiles by name in the trace: "llama-2-7b" for all, or "chat=llama-2-7b,code=…"."""
    parts = [part.rpartition("=") for part in text.split(",")]
    return {name.strip(): profile.strip() for name, _, profile in parts}


def hosted_models(text: str) -> list[tuple[str, ...]]:
    """Models of each GPU: in "a,b,a+b" the first hosts a, the second b, the third both."""
    return [tuple(model.strip() for model in gpu.split("+")) for gpu in text.split(",")]


def origins(text: str) -> tuple[str, ...]:
    """Origins (RFC 6454), such as "https://a.example,http://localhost:3000", or a JSON list."""
    found = tuple(part.strip(" []\"'") for part in text.replace(";", ",").split(","))
    for origin in found:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise ValueError(f"{origin!r:.60} is no origin such as https://chat.example.org")
    return found


def switch(text: str) -> bool:
    """A switch in the environment or a YAML file."""
    if (value := SWITCHES.get(text.strip().lower())) is None:
        raise ValueError(f"{text!r} is neither true nor false")
    return value


def pair(text: str) -> tuple[str, str]:
    """A KEY=VALUE pair."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ValueError(f"{text!r:.60} is not KEY=VALUE")
    return key.strip(), value.strip()


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{text!r:.60} is no JSON object such as '{{\"top_k\": 20}}'")
    return found


def positive_or_inf(text: str) -> float:
    """A number over 0, or inf."""
    return math.inf if text.strip().lower() == "inf" else POSITIVE(text)


def one_of(names: tuple[str, ...], text: str) -> str:
    """One of these names."""
    if text.strip() not in names:
        raise ValueError(f"{text!r:.60} is not one of {', '.join(names)}")
    return text.strip()
