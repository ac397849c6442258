"""The flags of runs: name, reader and help of each, in the groups that `--help` shows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mellmpi.cli.values import (
    COUNT,
    FRACTION,
    NUMBER,
    POSITIVE,
    SECONDS,
    SEED,
    SHARE,
    THREADS,
    byte_size,
    switch,
)
from mellmpi.config import CHECKSUMS, DEVICE_BUFFERS, DTYPES, MIGRATE

TRACES = (
    "uniform CSV or JSON Lines, Azure 2023 to 2025, BurstGPT, Mooncake, Bailian, Vidur; "
    "gzipped or not"
)
POLICIES = {  # -> what it does
    "best_fit": "fullest worker with room; migrates nothing",
    "worst_fit": "emptiest worker; migrates nothing",
    "load_balance": "emptiest worker; migrates for even load",
    "mell": "packs by size class, migrates (arXiv 2501.06709)",
    "frugal": "few workers, few bytes migrated",
}
POLICY_LINES = "\n".join(f"{name}: {meaning}" for name, meaning in POLICIES.items())
THRIFT = "0 … 1: how hard to consolidate; 0 moves the fewest bytes, 1 uses the fewest workers"


@dataclass(frozen=True)
class Flag:
    """One flag of the command line, the environment and the YAML file."""

    name: str  # as typed, without the dashes; also the YAML key
    read: Callable[[str], object]  # ValueError says which values are allowed
    help: str
    metavar: str | None = None
    choices: Sequence[str] | None = None
    is_switch: bool = False
    is_list: bool = False  # may be repeated; in the environment values are separated by ;
    takes_several: bool = False  # one or more values after the flag

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"MELLMPI_{self.key.upper()}"


@dataclass(frozen=True)
class Group:
    """Flags under one heading of `--help`."""

    title: str
    flags: tuple[Flag, ...]


def flags_of(groups: Iterable[Group]) -> Iterator[Flag]:
    """All flags of these groups."""
    return (flag for group in groups for flag in group.flags)


MODEL = Group(
    "model",
    (
        Flag(
            "model",
            str,
            "smollm2 (default), a Hugging Face directory, a .gguf file, a hub name, or "
            "random:CONFIG; repeat it to serve several models",
            "M",
            is_list=True,
        ),
        Flag(
            "served-model-name",
            str,
            "name that requests use (default: the value of --model); once for each --model",
            "NAME",
            is_list=True,
        ),
        Flag(
            "worker-models",
            str,
            "comma-separated names of the models that worker 1 hosts; repeat it for worker 2, "
            "3 …; further workers begin again with the first set (default: every worker hosts all)",
            "NAMES",
            is_list=True,
        ),
        Flag("dtype", str, "type of weights and KV (default: bfloat16)", choices=DTYPES),
        Flag(
            "max-model-len", COUNT, "prompt + output tokens (default: what model and KV allow)", "N"
        ),
        Flag("chat-template", str, "Jinja file, instead of the model's own template", "FILE"),
        Flag("seed", SEED, "of random weights and of --migrate stress (default: 0)", "N"),
        Flag("cache-dir", str, "directory of converted models (default: ~/.cache/mellmpi)", "DIR"),
    ),
)
DEVICES = Group(
    "devices",
    (
        Flag(
            "device",
            str,
            "auto (default): CUDA where there is a GPU",
            choices=("auto", "cpu", "cuda"),
        ),
        Flag("oversubscribe-gpus", switch, "let workers share a GPU", is_switch=True),
        Flag(
            "threads",
            THREADS,
            "compute threads of a worker (default: cores of the host / its workers)",
            "N",
        ),
    ),
)
CACHE = Group(
    "KV cache",
    (
        Flag(
            "kv-cache-memory-bytes",
            byte_size,
            "size of a worker's KV cache, such as 512M (default: a share of the GPU, 1G on a CPU)",
            "SIZE",
        ),
        Flag(
            "gpu-memory-utilization",
            SHARE,
            "share of a GPU's memory for weights and KV (default: 0.9)",
            "X",
        ),
        Flag("block-size", COUNT, "tokens of a KV block (default: 16)", "N"),
        Flag(
            "enable-prefix-caching",
            switch,
            "reuse the KV of prompts that begin with the same tokens",
            is_switch=True,
        ),
    ),
)
BATCHING = Group(
    "batching",
    (
        Flag("max-num-seqs", COUNT, "most sequences in a worker's batch (default: 64)", "N"),
        Flag(
            "max-num-batched-tokens",
            COUNT,
            "most tokens that a worker computes in one step (default: 512)",
            "N",
        ),
        Flag(
            "target-step-ms",
            POSITIVE,
            "a step computes as many prompt tokens as fit into this time beside its decodes "
            "(default: twice a step of decodes alone, at least 50; no limit for a batch without "
            "--request-rate)",
            "MS",
        ),
    ),
)
POLICY = Group(
    "policy and migration",
    (
        Flag(
            "policy",
            str,
            f"placement and migration policy (default: frugal)\n{POLICY_LINES}",
            choices=tuple(POLICIES),
        ),
        Flag("thrift", FRACTION, f"{THRIFT} (for frugal; default: 0.5)", "X"),
        Flag(
            "migrate",
            str,
            "auto (default): as the policy decides; never; stress: at random, for tests",
            choices=MIGRATE,
        ),
        Flag(
            "rebalance-every-s",
            SECONDS,
            "shortest time between two looks of the policy at the whole cluster (default: 0.1)",
            "S",
        ),
        Flag(
            "migration-limit-s",
            POSITIVE,
            "defer a migration that would take longer until others have ended (default: 1)",
            "S",
        ),
        Flag(
            "max-ttft-s",
            POSITIVE,
            "refuse a request at once if its first token is expected later than this "
            "(default: no limit)",
            "S",
        ),
        Flag("park-after-s", SECONDS, "a worker may park once empty for S (default: 1)", "S"),
    ),
)
TRANSPORT = Group(
    "transport",
    (
        Flag(
            "measure-links",
            switch,
            "measure links at the start, for about a second (default: yes)",
            is_switch=True,
        ),
        Flag(
            "checksums",
            str,
            "of KV blocks in transfer; auto (default): between hosts; always: device memory then "
            "goes through host memory",
            choices=CHECKSUMS,
        ),
        Flag(
            "device-buffers",
            str,
            "auto (default): MPI takes device memory where a self-test passes; never: through "
            "host memory",
            choices=DEVICE_BUFFERS,
        ),
    ),
)
FILES = Group(
    "requests and answers",
    (
        Flag(
            "input-file",
            str,
            "requests, one JSON object per line (OpenAI's batch format); - is a pipe",
            "FILE",
        ),
        Flag(
            "output-file",
            str,
            "answers, appended as they complete; a second run skips the requests that the file "
            "answers already; - is a pipe",
            "FILE",
        ),
        Flag(
            "request-rate",
            POSITIVE,
            "requests arrive at R per second, as a Poisson process (default: all at once)",
            "R",
        ),
    ),
)
REPLAY = Group(
    "replay of a trace",
    (
        Flag(
            "replay",
            str,
            "replaces --input-file: arrivals and lengths from a trace, made-up tokens; "
            f"traces: {TRACES}",
            "TRACE",
        ),
        Flag("rate-scale", POSITIVE, "requests arrive X times as fast (default: 1)", "X"),
        Flag("length-scale", POSITIVE, "prompts and answers are X times as long (default: 1)", "X"),
        Flag("max-requests", COUNT, "only the first N requests (default: all)", "N"),
    ),
)
REPORTS = Group(
    "reports",
    (
        Flag("report", str, "write figures of the run as JSON", "FILE"),
        Flag(
            "timeline",
            str,
            "draw the run: each worker's KV over time, migrations, parked workers",
            "FILE.png",
        ),
        Flag("show", NUMBER, "print the first N answers (default: 0)", "N"),
    ),
)
TRACE = Group(
    "trace",
    (Flag("trace-out", str, "write steps, requests and moves for ui.perfetto.dev", "FILE.json"),),
)
SERVING = (MODEL, DEVICES, CACHE, BATCHING, POLICY, TRANSPORT)
BATCH = (FILES, REPLAY, REPORTS, TRACE)
SHORT = {"input-file": "-i", "output-file": "-o"}
