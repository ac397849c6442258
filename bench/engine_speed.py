"""How fast is one worker, compared with transformers, vLLM and llama.cpp?

`mellmpi` is the whole runtime, with requests and answers as JSON lines; `engine` is the worker's
loop without the runtime, to measure the overhead. All systems load SmolLM2-135M in bfloat16, use
the same number of threads, get the same seeded token ids, and generate greedily without
end-of-sequence. Timed are one batch, from its submission until all tokens of all requests are there
(prefill included), and single prompts by length: time to first token, and prefill tokens/s. Each
system is one process on the same cores; loading and one warm-up of every batch size are not timed;
rounds of the systems alternate; medians are compared.

    bash bench/peers/install.sh                  # once
    python bench/engine_speed.py --json bench/results/engine_speed.json
    CPU=avx2 bash bench/peers/install.sh ~/.cache/mellmpi-peers-avx2
    python bench/engine_speed.py --cpu avx2 --peers ~/.cache/mellmpi-peers-avx2 \
        --json bench/results/engine_speed_avx2.json     # hides more recent features of the CPU
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record

from mellmpi.models import resolve

HERE = Path(__file__).resolve().parent
SYSTEMS = ("mellmpi", "engine", "transformers", "vllm", "llama.cpp")
SPEEDS = {
    "output_throughput": "output tokens/s, end to end",
    "tokens_per_core_second": "output tokens per second of processor time",
}
HIDDEN = {  # environment that limits libraries to AVX2: numba's LLVM, oneDNN, torch
    "native": {},
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}
FIRST_ID, LAST_ID = 100, 49_000  # ordinary tokens of SmolLM2


@dataclass(frozen=True)
class Answer:
    """A system's answer to one batch."""

    outputs: list[list[int]]
    seconds: float
    cpu_seconds: float
    memory_mb: int


class System:
    """One system in its own process, ready for batches."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self._log = name, args.peers / f"{name}.log"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                ["taskset", "--cpu-list", args.cores, *_command(name, args)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | HIDDEN[args.cpu] | {"OMP_NUM_THREADS": str(args.threads)},
            )
        self.version = self._read()["ready"]

    def answer(self, prompts: list[list[int]], num_out: int) -> Answer:
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_out": num_out}) + "\n")
        self._process.stdin.flush()
        answer = Answer(**self._read())
        assert [len(tokens) for tokens in answer.outputs] == [num_out] * len(prompts), self.name
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early; its log is {self._log}")
        return json.loads(line)


def _command(name: str, args: argparse.Namespace) -> list[str]:
    """The command that starts a system; `answer.py` describes its protocol."""
    ours, vllm = sys.executable, str(args.peers / "vllm/bin/python")
    model, gguf = str(args.directory), str(args.peers / "smollm2-bf16.gguf")
    server = str(args.peers / "llama.cpp/build/bin/llama-server")
    command = {
        "mellmpi": [ours, f"{HERE}/peers/ours.py", "--model", model],
        "engine": [ours, f"{HERE}/peers/ours_engine.py", "--model", model],
        "transformers": [ours, f"{HERE}/peers/transformers_generate.py", "--model", model],
        "vllm": [vllm, f"{HERE}/peers/vllm_cpu.py", "--model", model],
        "llama.cpp": [ours, f"{HERE}/peers/llama_cpp.py", "--model", gguf, "--server", server],
    }[name]
    return [
        *command,
        "--threads",
        str(args.threads),
        "--max-requests",
        str(max(args.requests)),
        "--max-len",
        str(max(args.num_in + args.num_out, *args.prefill) + 16),
    ]


def make_prompts(num_requests: int, num_in: int, seed: int) -> list[list[int]]:
    rng = random.Random(f"{num_requests} {seed}")
    return [[rng.randint(FIRST_ID, LAST_ID) for _ in range(num_in)] for _ in range(num_requests)]


Answers = dict[int, dict[str, list[Answer]]]  # number of requests -> system -> one a round


def measure(systems: list[System], args: argparse.Namespace) -> Answers:
    """Answers of all rounds; round 0 is the warm-up and does not count."""
    answers: Answers = {n: {s.name: [] for s in systems} for n in args.requests}
    for round_ in range(args.rounds + 1):
        for n in args.requests:
            prompts = make_prompts(n, args.num_in, round_)
            for system in systems:
                answer = system.answer(prompts, args.num_out)
                speed = n * args.num_out / answer.seconds
                note(f"round {round_}  {n:3d} requests  {system.name:13s} {speed:7.1f} tokens/s")
                if round_:
                    answers[n][system.name].append(answer)
    return answers


def measure_prefill(systems: list[System], args: argparse.Namespace) -> dict[str, Any]:
    """{tokens of a prompt: {system: its time to first token}}; medians without the first round."""
    found: dict[str, Any] = {}
    for num_in in args.prefill:
        seconds: dict[str, list[float]] = {system.name: [] for system in systems}
        for round_ in range(args.rounds + 1):
            for system in systems:
                answer = system.answer(make_prompts(1, num_in, 1000 + round_), 1)
                if round_:
                    seconds[system.name].append(answer.seconds)
        found[str(num_in)] = {name: _first_token(num_in, took) for name, took in seconds.items()}
    return found


def _first_token(num_in: int, seconds: list[float]) -> dict[str, Any]:
    ttft_s = statistics.median(seconds)
    return {
        "ttft_ms": round(1000 * ttft_s, 1),
        "prefill_tokens_per_s": round(num_in / ttft_s, 1),
        "seconds": [round(s, 4) for s in seconds],
    }


def prefill_table(found: dict[str, Any]) -> str:
    names = list(next(iter(found.values())))
    lines = ["prefill tokens/s (time to first token, ms)", f"{'prompt':>8s}" + _cells(names)]
    for num_in, row in found.items():
        cells = [f"{f['prefill_tokens_per_s']:.0f} ({f['ttft_ms']:.0f})" for f in row.values()]
        lines.append(f"{num_in:>8s}" + _cells(cells))
    return "\n".join(lines)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def summarise(answers: Answers, num_out: int) -> dict[str, Any]:
    """{requests: {system: figures}}; a ratio is the speed of mellmpi divided by the system's."""
    return {str(n): _row(by_name, n * num_out) for n, by_name in answers.items()}


def _row(by_name: dict[str, list[Answer]], num_tokens: int) -> dict[str, Any]:
    reference = next(iter(by_name.values()))
    row = {
        name: {
            "output_throughput": num_tokens / statistics.median(a.seconds for a in done),
            "tokens_per_core_second": num_tokens / statistics.median(a.cpu_seconds for a in done),
            "seconds": [round(a.seconds, 3) for a in done],
            "cpu_seconds": [round(a.cpu_seconds, 2) for a in done],
            "same_first_token": round(_same_first_token(done, reference), 3),
            "memory_mb": max(a.memory_mb for a in done),
        }
        for name, done in by_name.items()
    }
    for speed in SPEEDS:
        for figures in row.values():
            if own := row.get("mellmpi"):
                figures[f"{speed}_ratio"] = round(own[speed] / figures[speed], 3)
    return row


def _same_first_token(a: list[Answer], b: list[Answer]) -> float:
    """The share of requests with equal first tokens, as a check of the weights.

    In bfloat16 near ties may differ.
    """
    pairs = [
        (first[0], second[0])
        for x, y in zip(a, b, strict=True)
        for first, second in zip(x.outputs, y.outputs, strict=True)
    ]
    return sum(first == second for first, second in pairs) / len(pairs)


def table(results: dict[str, Any], speed: str) -> str:
    names = list(next(iter(results.values())))
    lines = [f"{SPEEDS[speed]} (mellmpi over it)", f"{'requests':>8s}" + _cells(names)]
    for n, row in results.items():
        cells = [
            f"{figures[speed]:.1f} ({figures.get(f'{speed}_ratio', float('nan')):.2f}x)"
            for figures in row.values()
        ]
        lines.append(f"{n:>8s}" + _cells(cells))
    return "\n".join(lines)


def _cells(texts: list[str]) -> str:
    return "".join(f"{text:>17s}" for text in texts)


def disturbed(answers: Answers, threads: int) -> list[str]:
    """The measurements in which a system had less than 90 % of its cores, because of other load."""
    return [
        f"{name} at {n} requests"
        for n, by_name in answers.items()
        for name, done in by_name.items()
        if statistics.median(a.cpu_seconds / a.seconds for a in done) < 0.9 * threads
    ]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cache = Path.home() / ".cache"
    parser.add_argument("--peers", type=Path, default=cache / "mellmpi-peers")
    parser.add_argument(
        "--cache-dir", type=Path, default=cache / "mellmpi", help="directory of converted models"
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cores", help="a list for taskset; default: the last --threads cores")
    parser.add_argument("--num-in", type=int, default=128)
    parser.add_argument("--num-out", type=int, default=128)
    parser.add_argument("--prefill", nargs="+", type=int, default=[128, 1024], metavar="TOKENS")
    parser.add_argument(
        "--cpu", choices=HIDDEN, default="native", help="features of the CPU to use"
    )
    record.add_json_option(parser)
    args = parser.parse_args()
    available = sorted(os.sched_getaffinity(0))
    args.cores = args.cores or ",".join(map(str, available[-args.threads :]))
    args.peers.mkdir(parents=True, exist_ok=True)
    args.directory = resolve("smollm2", args.cache_dir)
    return args


def main() -> None:
    args = options()
    systems = []
    for name in args.systems:
        note(f"loading {name} …")
        systems.append(System(name, args))
    answers = measure(systems, args)
    prefill = measure_prefill(systems, args)
    for system in systems:
        system.close()
    results = summarise(answers, args.num_out)
    for speed in SPEEDS:
        note(table(results, speed))
    note(prefill_table(prefill))
    if busy := disturbed(answers, args.threads):
        note(f"other processes used the cores, so tokens/s is low: {', '.join(busy)}")
    config = {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "bfloat16",
        "num_in": args.num_in,
        "num_out": args.num_out,
        "cpu": args.cpu,
        "threads": args.threads,
        "cores": args.cores,
        "rounds": args.rounds,
        "systems": {s.name: s.version for s in systems},
    }
    record.finish(config, {**results, "prefill": prefill}, args.json)


if __name__ == "__main__":
    main()
