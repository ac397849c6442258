"""How fast is the whole server, end to end over HTTP, beside llama-server and vLLM's CPU server?

    bash bench/peers/install.sh                  # once
    python bench/serving.py --json bench/results/serving.json

Every system serves SmolLM2-135M in bfloat16 on the same cores; `mellmpi bench serve` sends the
same random prompts at the same Poisson arrivals to each. Rounds of the systems alternate, and
medians are compared. A system is started anew for each round, warmed up, and measured alone.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import record

from mellmpi.models import resolve

HERE = Path(__file__).resolve().parent
READY_S = 180.0
FIGURES = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms")


def command(name: str, port: int, model: Path, args: argparse.Namespace) -> list[str]:
    """The command that starts a system."""
    threads, limit = str(args.threads), str(args.max_len)
    if name == "mellmpi":
        ranks = [str(HERE.parent / "launch" / "mpirun.sh"), "-n", str(args.workers + 1)]
        per_worker = str(max(1, args.threads // args.workers))
        ours = [
            sys.executable,
            "-m",
            "mellmpi",
            "serve",
            "--port",
            str(port),
            "--model",
            str(model),
        ]
        return [*ranks, *ours, "--threads", per_worker, "--served-model-name", "m"]
    if name == "vllm":
        python = args.peers / "vllm" / "bin" / "python"
        flags = ["--model", str(model), "--dtype", "bfloat16", "--max-model-len", limit]
        server = [str(python), "-m", "vllm.entrypoints.openai.api_server", *flags]
        return [*server, "--port", str(port), "--served-model-name", "m", "--max-num-seqs", "64"]
    server = args.peers / "llama.cpp" / "build" / "bin" / "llama-server"
    slots = 32
    flags = ["--model", str(args.peers / "smollm2-bf16.gguf"), "--alias", "m", "--no-webui"]
    flags += ["--threads", threads, "--threads-batch", threads, "--parallel", str(slots)]
    flags += ["--ctx-size", str(slots * args.max_len), "--port", str(port), "--no-cache-prompt"]
    return [str(server), *flags, "--cache-type-k", "bf16", "--cache-type-v", "bf16"]


class Server:
    """A running system; use as a context manager."""

    def __init__(self, name: str, model: Path, args: argparse.Namespace):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open while the server runs)
        self._process = subprocess.Popen(
            command(name, self.port, model, args),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_KVCACHE_SPACE": "1"},
        )

    def __enter__(self) -> "Server":
        end_s = time.monotonic() + READY_S
        while True:
            if self._process.poll() is not None or time.monotonic() > end_s:
                self._log.seek(0)
                raise SystemExit(self._log.read().decode(errors="replace")[-3000:])
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)

    def __exit__(self, *_: Any) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def load(port: int, args: argparse.Namespace, num_prompts: int, rate: str) -> dict[str, Any]:
    """Run `bench serve` once; return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "base-url": f"http://127.0.0.1:{port}",
            "model": "m",
            "dataset-name": "random",
            "random-input-len": args.input_len,
            "random-output-len": args.output_len,
            "num-prompts": num_prompts,
            "request-rate": rate,
            "seed": args.seed,
            "result-dir": folder,
            "result-filename": "result.json",
        }
        given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        bench = [sys.executable, "-m", "mellmpi", "bench", "serve", *given]
        subprocess.run([*bench, "--save-result", "--disable-tqdm"], check=True, capture_output=True)
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    assert result["completed"] == num_prompts, result
    return result


def main() -> None:
    """Measure every system `--rounds` times, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", nargs="+", default=["mellmpi", "llama.cpp", "vllm"])
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "mellmpi-peers")
    parser.add_argument(
        "--workers", type=int, default=1, help="of mellmpi, with equal shares of the threads"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--request-rate", default="2")
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--max-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    record.add_json_option(parser)
    args = parser.parse_args()
    model = resolve("smollm2", Path.home() / ".cache" / "mellmpi")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.systems}
    for _ in range(args.rounds):
        for name in args.systems:
            with Server(name, model, args) as server:
                load(server.port, args, 4, "inf")
                result = load(server.port, args, args.num_prompts, args.request_rate)
            runs[name].append({figure: result[figure] for figure in FIGURES})
            print(f"{name:<10} {runs[name][-1]}", file=sys.stderr)
    medians = {
        name: {f: statistics.median(run[f] for run in done) for f in FIGURES}
        for name, done in runs.items()
    }
    for name, figures in medians.items():
        shown = "  ".join(f"{figure} {value:8.1f}" for figure, value in figures.items())
        print(f"{name:<10} {shown}", file=sys.stderr)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "json"}
    record.finish(config, {"medians": medians, "runs": runs}, args.json, shown=False)


if __name__ == "__main__":
    main()
