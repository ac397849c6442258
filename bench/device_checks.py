"""Does everything that needs a GPU work on this one, and how near does it come to its limits?

    python bench/device_checks.py [--json FILE] [--model smollm2] [--only CHECK …]

Three ranks share one device; takes less than 8 minutes. Without a GPU it says so and ends with 0.
Every check is a process with a time limit. If a check fails, its reason is printed, the others go
on, and the exit code is 1. If the default model is not installed, a model of its shape with random
weights is used. `--rehearse` runs all checks on the CPU with a tiny model. MPI is started by
launch/mpirun.sh: MELLMPI_MCA="--mca pml ucx" selects another messaging layer.

self_test   does this MPI send device buffers correctly? Are copies through pinned memory correct?
doctor      what `python -m mellmpi doctor` prints about path and links of three ranks
bandwidth   of every path between two ranks, compared with the device's copies to and from the host
tokens      greedy, float32: the engine on the device compared with the reference on the CPU
migration   a batch under `--migrate stress` on two workers compared with one worker without
            migrations: the same tokens? Through pinned memory and, if it works, by MPI
roofline    decode compared with memory bandwidth, prefill with a matrix product
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alone import within
from gpu_checks import CACHE, CHECKS
from record import add_json_option, finish
from roofline import TINY

LIMITS_S = {
    "self_test": 80,
    "doctor": 40,
    "bandwidth": 90,
    "tokens": 70,
    "migration": 120,
    "roofline": 70,
}
DEFAULT = "smollm2"
DEFAULT_SHAPE = {  # used if the default model is not installed
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "head_dim": 64,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
# --- the driver ----------------------------------------------------------------------------------


def alone(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one check in its own process. Returns its result, or why it failed."""
    command = [sys.executable, __file__, "--one", name, "--model", args.model]
    command += ["--rehearse"] * args.rehearse + ["--direct"] * args.direct
    started_s = time.perf_counter()
    out, err, code = within(LIMITS_S[name], command)
    took_s = round(time.perf_counter() - started_s, 1)
    if code is None:
        return {"ok": False, "why": f"not done in {LIMITS_S[name]} s", "took_s": took_s}
    if code or not out.strip():
        return {"ok": False, "why": err[-2000:], "took_s": took_s}
    return {**json.loads(out.splitlines()[-1]), "took_s": took_s}


def usable(model: str | None, rehearse: bool, folder: Path) -> str:
    """Return the model to serve: the default, or its shape if the default is not installed."""
    if model is not None:
        return model
    if rehearse:
        return TINY
    from mellmpi.models import resolve

    try:
        resolve(DEFAULT, CACHE)
    except ValueError as error:
        print(f"{error}; using random weights of its shape", file=sys.stderr)
        (folder / "like-smollm2.json").write_text(json.dumps(DEFAULT_SHAPE))
        return f"random:{folder / 'like-smollm2.json'}"
    return DEFAULT


def gpu(device: str) -> dict[str, Any]:
    """Return name and driver version of the GPU."""
    import torch

    if device == "cpu":
        return {"name": "none: rehearsed on the CPU"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        said = "nvidia-smi is not installed"
    return {"name": torch.cuda.get_device_name(0), "cuda": torch.version.cuda, "driver": said}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help=f"for tokens and migration (default: {DEFAULT})")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CHECKS,
        default=list(CHECKS),
        metavar="CHECK",
        help=", ".join(CHECKS),
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    add_json_option(parser)
    args = parser.parse_args()
    args.device = "cpu" if args.rehearse else "cuda:0"
    return args


def main() -> int:
    args = options()
    if args.one:
        print(json.dumps(CHECKS[args.one](args)))
        return 0
    from mellmpi.runtime.gpus import count_gpus

    if not args.rehearse and not count_gpus():
        print("no GPU here: nothing was checked", file=sys.stderr)
        return 0
    started_s, results = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        args.model = usable(args.model, args.rehearse, Path(folder))
        for name in args.only:
            found = results[name] = alone(name, args)
            args.direct |= found.get("device_buffers_work", False)
            state = "passed" if found["ok"] else f"FAILED: {found.get('why', found)}"
            print(f"{name:<12}{state}  ({found['took_s']} s)", file=sys.stderr)
    config = {
        "model": args.model,
        "gpu": gpu(args.device),
        "load": round(os.getloadavg()[0], 1),
        "took_s": round(time.perf_counter() - started_s, 1),
    }
    finish(config, results, args.json)
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
