"""Every flag of the command line: its name, how it is read, and what it means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mellmpi.config import CHECKSUMS, DEVICE_BUFFERS, DTYPES, MIGRATE

TRACES = (
    "uniform CSV or JSON Lines, Azure 2023 to 2025, BurstGPT, Mooncake, Bailian, Vidur; "
    "gzipped or not"
)
POLICIES = ("best_fit", "worst_fit", "load_balance", "mell", "frugal")


@dataclass(frozen=True)
class Flag:
    """One option: where its value goes, how it is read, and what it means."""

    name: str  # as typed, without the dashes; also the YAML key
    read: Callable[[str], Any]
    help: str
    metavar: str | None = None
    choices: Sequence[str] | None = None
    is_switch: bool = False
    is_list: bool = False  # may be given several times; in the environment with ; between

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"MELLMPI_{self.key.upper()}"


@dataclass(frozen=True)
class Whole:
    """Reads whole numbers from `least` to `most`. ValueError says which ones are allowed."""

    least: int
    most: int

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # no number, or one with thousands of digits
            value = self.least - 1
        if not self.least <= value <= self.most:
            raise ValueError(f"{text!r:.60} is no whole number from {self.least} to {self.most}")
        return value


@dataclass(frozen=True)
class Real:
    """Reads numbers from `least` to `most`. ValueError says which ones are allowed."""

    least: float
    most: float

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not self.least <= value <= self.most:  # never true of nan
            raise ValueError(f"{text!r:.60} is no number from {self.least:g} to {self.most:g}")
        return value


COUNT, NUMBER, SEED = Whole(1, 2**31 - 1), Whole(0, 2**31 - 1), Whole(0, 2**63 - 1)
THREADS, GPUS = Whole(1, 1024), Whole(1, 100_000)
POSITIVE, SECONDS = Real(1e-9, 1e9), Real(0, 1e9)
TICK = Real(1e-3, 1e9)  # seconds; a simulation of shorter ones would not end
FRACTION, SHARE = Real(0, 1), Real(1e-9, 1)
LARGEST_TOKEN_BYTES = 2**30  # times the tokens of the longest request, it fits into 63 bits


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
    """512K for all, or a=512K,b=128K by model."""
    parts = [part.rpartition("=") for part in text.split(",")]
    return {name.strip(): byte_size(size, LARGEST_TOKEN_BYTES) for name, _, size in parts}


def known_by_model(text: str) -> dict[str, str]:
    """llama-2-7b for all, or chat=llama-2-7b,code=llama-3-8b by the names in a trace."""
    parts = [part.rpartition("=") for part in text.split(",")]
    return {name.strip(): known.strip() for name, _, known in parts}


def hosted(text: str) -> list[tuple[str, ...]]:
    """a,b,a+b: the first GPU hosts a, the second b, the third both."""
    return [tuple(m.strip() for m in models.split("+")) for models in text.split(",")]


def switch(text: str) -> bool:
    """A switch in the environment or a YAML file."""
    known = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if text.strip().lower() not in known:
        raise ValueError(f"{text!r} is neither true nor false")
    return known[text.strip().lower()]


SERVING = (
    Flag(
        "model",
        str,
        "smollm2 (default), a Hugging Face directory, a .gguf file, a hub name, or "
        "random:CONFIG; several times for several models",
        "M",
        is_list=True,
    ),
    Flag(
        "served-model-name",
        str,
        "the name that requests use (default: as --model); once a --model",
        "NAME",
        is_list=True,
    ),
    Flag(
        "worker-models",
        str,
        "names, with commas between, of the models that worker 1 hosts; "
        "again for worker 2 …, then over again (default: all host all)",
        "NAMES",
        is_list=True,
    ),
    Flag("dtype", str, "of weights and KV (default: bfloat16)", choices=DTYPES),
    Flag("max-model-len", COUNT, "prompt + output tokens (default: what model and KV allow)", "N"),
    Flag("chat-template", str, "Jinja file in place of the model's own", "FILE"),
    Flag("block-size", COUNT, "tokens a KV block (default: 16)", "N"),
    Flag(
        "kv-cache-memory-bytes",
        byte_size,
        "of each worker, such as 512M (default: a share of the GPU, 1G on a CPU)",
        "SIZE",
    ),
    Flag("gpu-memory-utilization", SHARE, "share of a GPU for weights and KV (default: 0.9)", "X"),
    Flag(
        "enable-prefix-caching", switch, "reuse the KV of prompts that begin alike", is_switch=True
    ),
    Flag("max-num-seqs", COUNT, "sequences a worker decodes at once (default: 64)", "N"),
    Flag(
        "max-num-batched-tokens",
        COUNT,
        "tokens a worker computes in one step, at most (default: 512)",
        "N",
    ),
    Flag(
        "target-step-ms",
        POSITIVE,
        "a step computes as many prompt tokens as fit into this time "
        "beside its decodes (default: twice a step that only decodes, at least 50; no limit in a "
        "batch without --request-rate)",
        "MS",
    ),
    Flag("policy", str, "who goes where (default: frugal)", choices=POLICIES),
    Flag(
        "migrate",
        str,
        "never; auto (default): as the policy decides; stress: at random, for tests",
        choices=MIGRATE,
    ),
    Flag("rebalance-every-s", SECONDS, "the policy looks at the whole cluster (default: 0.1)", "S"),
    Flag(
        "migration-limit-s",
        POSITIVE,
        "moves that would take longer wait until others have ended (default: 1)",
        "S",
    ),
    Flag(
        "thrift",
        FRACTION,
        "of frugal: 0 moves the fewest bytes, 1 uses the fewest workers (default: 0.5)",
        "X",
    ),
    Flag("park-after-s", SECONDS, "a worker empty for so long may be parked (default: 1)", "S"),
    Flag(
        "threads", THREADS, "compute threads a worker (default: cores / workers of the host)", "N"
    ),
    Flag("device", str, "auto (default), cpu or cuda", choices=("auto", "cpu", "cuda")),
    Flag("oversubscribe-gpus", switch, "let workers share a GPU", is_switch=True),
    Flag(
        "checksums",
        str,
        "of KV blocks on their way (default: auto, between hosts; always: "
        "device memory then goes through the host)",
        choices=CHECKSUMS,
    ),
    Flag(
        "device-buffers",
        str,
        "auto (default): MPI takes device memory where a test of it "
        "passes; never: through host memory",
        choices=DEVICE_BUFFERS,
    ),
    Flag("measure-links", switch, "at the start, in about a second (default: yes)", is_switch=True),
    Flag("seed", SEED, "of random weights and of --migrate stress (default: 0)", "N"),
    Flag("cache-dir", str, "where converted models are kept (default: ~/.cache/mellmpi)", "DIR"),
)
BATCH = (
    Flag(
        "input-file",
        str,
        "requests, one JSON object a line (OpenAI's batch form); - is a pipe",
        "FILE",
    ),
    Flag(
        "output-file",
        str,
        "answers, appended as they complete; a second run skips those it finds; - is a pipe",
        "FILE",
    ),
    Flag(
        "request-rate",
        POSITIVE,
        "requests arrive at R a second, Poisson (default: all at once)",
        "R",
    ),
    Flag(
        "replay",
        str,
        f"in place of -i: arrivals and lengths of a trace, made-up tokens; traces: {TRACES}",
        "TRACE",
    ),
    Flag("rate-scale", POSITIVE, "of a replay: requests arrive X times as fast (default: 1)", "X"),
    Flag(
        "length-scale",
        POSITIVE,
        "of a replay: prompts and answers are X times as long (default: 1)",
        "X",
    ),
    Flag("max-requests", COUNT, "of a replay: only the first N (default: all)", "N"),
    Flag("report", str, "write figures of the run as JSON", "FILE"),
    Flag(
        "timeline",
        str,
        "draw the run: KV of every worker over time, moves, parked workers",
        "FILE.png",
    ),
    Flag("show", NUMBER, "print so many of the first answers (default: 0)", "N"),
)
SIMULATE = (
    Flag("trace", str, f"arrivals and lengths: {TRACES}", "FILE"),
    Flag("rate-scale", POSITIVE, "requests arrive X times as fast (default: 1)", "X"),
    Flag(
        "model",
        known_by_model,
        "a known model, for sizes and times; or several, by their names "
        "in the trace: chat=llama-2-7b,code=llama-3-8b",
        "NAME",
    ),
    Flag(
        "kv-bytes-per-token",
        sizes_by_model,
        "of any other model, such as 512K; or, by the names of models in the trace, a=512K,b=128K",
        "SIZE",
    ),
    Flag(
        "hosts",
        hosted,
        "of several models, which GPU hosts what: a,b,a+b for three GPUs, and so "
        "on from the first (default: every GPU hosts all)",
        "MODELS",
    ),
    Flag("gpu-kv-gib", POSITIVE, "GiB of KV cache a GPU", "G"),
    Flag("policies", str, "to compare, with commas between", "NAMES"),
    Flag("ideal", switch, "prefill, waking and moves take no time", is_switch=True),
    Flag("decode-rate", POSITIVE, "tokens/s of every request, with --ideal (default: 30)", "R"),
    Flag(
        "profile",
        str,
        "what steps, transfers and waking take, without --ideal: A100-40G "
        "(default), RTX-4090, H100",
        "GPU",
    ),
    Flag(
        "cost-from", str, "in place of a profile, what a run took: its run-batch --report", "REPORT"
    ),
    Flag("tick-s", TICK, "the policy looks at the whole cluster (default: 0.25)", "S"),
    Flag("gpus", GPUS, "at most so many (default: as many as it takes)", "MAX"),
    Flag("thrift", FRACTION, "of frugal (default: 0.5)", "X"),
    Flag("seed", SEED, "of what is random (default: 0)", "N"),
    Flag("json", str, "write the figures", "OUT"),
    Flag("plot", str, "draw the figures", "OUT.png"),
    Flag("frontier", switch, "run frugal at thrifts from 0 to 1, too", is_switch=True),
)
SHORT = {"input-file": "-i", "output-file": "-o"}
