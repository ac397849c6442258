"""Does everything that needs a GPU work on this one, and how near does it come to its limits?

    python bench/device_checks.py [--json FILE] [--model smollm2] [--only CHECK …]

One device, shared by three ranks; less than 8 minutes. Without a GPU it says so and ends with 0.
Every check is a process of its own with a time limit: one that fails says why, the others go on,
and the exit code is 1. Where the default model is not installed, random weights of its shape take
its place. `--rehearse` does all of it on the CPU with a tiny model, to see that it runs. MPI is
started by launch/mpirun.sh: MELLMPI_MCA="--mca pml ucx" tries another messaging layer.

self_test   does this MPI move device buffers, values compared? And are copies through pinned
            memory right?
doctor      what `python -m mellmpi doctor` says of path and links on three ranks
bandwidth   of every path between two ranks, against the device's own copies to and from the host
tokens      greedy, float32: the engine on the device against the reference on the CPU
migration   a batch under `--migrate stress` by two workers and a scheduler, against one worker
            that moves nothing: the same tokens? Through pinned memory and, if it works, by MPI
roofline    decode against memory bandwidth, prefill against what a matrix product reaches
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alone import ROOT, within
from record import add_json_option, finish
from roofline import TINY, copies
from roofline import roofline as near_the_roof

HERE = Path(__file__).resolve().parent
LIMITS_S = {
    "self_test": 80,
    "doctor": 40,
    "bandwidth": 90,
    "tokens": 70,
    "migration": 120,
    "roofline": 70,
}
CACHE = Path.home() / ".cache" / "mellmpi"
DEFAULT = "smollm2"
ITS_SHAPE = {  # for where it cannot be had
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
BLOCKS = 64  # of the trial of copies; a MiB each


MPIRUN = ["bash", str(ROOT / "launch" / "mpirun.sh")]


def launcher(num_ranks: int) -> list[str]:
    return [*MPIRUN, "-n", str(num_ranks), sys.executable]


def kind(device: str) -> str:
    """What `--device` is called."""
    return "cpu" if device == "cpu" else "cuda"


# --- checks: each returns plain data; "ok" says whether it holds ---------------------------------


def self_test(args: argparse.Namespace) -> dict[str, Any]:
    from mellmpi.transport.blocks import device_buffers_work

    started_s = time.perf_counter()
    works = device_buffers_work(args.device, MPIRUN)  # by the messaging layer that jobs use
    took_s = round(time.perf_counter() - started_s, 1)
    path = "by MPI, from device to device" if works else "through pinned host memory"
    found: dict[str, Any] = {
        "ok": True,
        "device_buffers_work": works,
        "path": path,
        "test_took_s": took_s,
    }
    if args.device != "cpu":
        found["ok"] = found["copies_right"] = copies_right(args.device)
    return found


def copies_right(device: str) -> bool:
    """Blocks go from one half of an arena to the other through slots, as transfers do: unchanged,
    on the word of `still` alone?"""
    import torch

    from mellmpi.transport.blocks import CudaCopies, DeviceArena, Staged

    arena = DeviceArena(2 * BLOCKS, 1 << 20, device)
    arena.blocks.random_(0, 256)
    torch.cuda.synchronize(device)
    lane = Staged(arena.block_bytes, CudaCopies(arena))

    def settle(addresses: list[int]) -> None:
        while not all(lane.still(address) for address in addresses):
            time.sleep(50e-6)

    for first in range(0, BLOCKS, 4):
        addresses = [lane.outgoing(block) for block in range(first, first + 4)]
        settle(addresses)
        for block, address in enumerate(addresses, first):
            lane.arrived(address, BLOCKS + block)
        settle(addresses)
        for address in addresses:
            lane.free(address)
    return bool(torch.equal(arena.blocks[:BLOCKS], arena.blocks[BLOCKS:]))


def doctor(args: argparse.Namespace) -> dict[str, Any]:
    done = subprocess.run(
        [
            *launcher(3),
            "-m",
            "mellmpi",
            "doctor",
            "--device",
            kind(args.device),
            "--oversubscribe-gpus",
        ],
        check=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    said = done.stdout.splitlines()
    return {"ok": any(line.startswith("blocks ") for line in said), "said": said}


def bandwidth(args: argparse.Namespace) -> dict[str, Any]:
    own = copies(args.device)
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        subprocess.run(
            [
                *launcher(2),
                str(HERE / "bandwidth.py"),
                "-m",
                f"{16 << 20}:{64 << 20}",
                "-i",
                "9",
                "-d",
                kind(args.device),
                "--json",
                output.name,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = json.loads(output.read())["results"]
    slowest = min(own["to_host"], own["from_host"])
    best = {
        path: max(row["MBps"] for row in rows if row["path"] == path) / 1e3
        for path in dict.fromkeys(row["path"] for row in rows)
    }
    shares = {path: round(GBps / slowest, 3) for path, GBps in best.items()}
    return {"ok": bool(rows), "copies_GBps": own, "rows": rows, "of_the_slower_copy": shares}


def answer(
    device: str,
    args: argparse.Namespace,
    prompts: list[list[int]],
    num_out: int,
    plain_torch: bool = False,
) -> list[list[int]]:
    """Greedy tokens in float32."""
    from mellmpi.config import BatchConfig, CacheConfig, ModelConfig
    from mellmpi.engine import build_executor
    from mellmpi.models import resolve
    from mellmpi.protocol import SCHEDULER, Assign, Request, Sampling
    from mellmpi.worker import BatchScheduler

    executor = build_executor(
        resolve(args.model, CACHE),
        ModelConfig(model=args.model, dtype="float32"),
        CacheConfig(kv_cache_memory_bytes=1 << 30),
        device=device,
        plain_torch=plain_torch,
    )
    batch = BatchScheduler(
        executor.models, executor.arena.num_blocks, 0, BatchConfig(), CacheConfig()
    )
    sampling = Sampling(num_out, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, (), None)
    name = executor.models[0].kv.model
    for i, prompt in enumerate(prompts):
        request = Request(i, name, tuple(prompt), sampling, None)
        batch.handle(SCHEDULER, Assign(request, i + 1, ()))
    found: list[list[int]] = [[] for _ in prompts]
    while (plan := batch.plan()) is not None:
        result = executor.execute(plan)
        sampled = [chunk.request_id for chunk in plan.chunks if chunk.sampling]
        for i, token in zip(sampled, result.tokens, strict=True):
            found[i].append(token)
        batch.commit(plan, result)
    executor.release()
    return found


def same_tokens(a: list[list[int]], b: list[list[int]]) -> dict[str, Any]:
    pairs = list(zip(a, b, strict=True))
    same = sum(x == y for one, two in pairs for x, y in zip(one, two, strict=False))
    return {
        "answers": len(pairs),
        "answers_alike": sum(one == two for one, two in pairs),
        "tokens": sum(len(one) for one in a),
        "tokens_alike": same,
    }


def tokens(args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(0)
    lengths = (5, 17, 64, 130, 300, 16, 33, 200)
    prompts = [[rng.randrange(3, 500) for _ in range(n)] for n in lengths]
    ours = answer(args.device, args, prompts, 32)
    alike = same_tokens(ours, answer("cpu", args, prompts, 32, plain_torch=True))
    # One near-tie may part an answer from there on; the first token depends on nothing before it.
    return {"ok": alike["answers_alike"] >= len(prompts) - 1, **alike}


def batch_run(
    args: argparse.Namespace, folder: Path, name: str, num_ranks: int, *flags: str
) -> tuple[list[list[int]], dict[str, Any]]:
    """`run-batch` on the device: (answers in order, report)."""
    out, report = folder / f"{name}.jsonl", folder / f"{name}.json"
    subprocess.run(
        [
            *launcher(num_ranks),
            "-m",
            "mellmpi",
            "run-batch",
            "-i",
            str(folder / "in.jsonl"),
            "-o",
            str(out),
            "--report",
            str(report),
            "--model",
            args.model,
            "--dtype",
            "float32",
            "--device",
            kind(args.device),
            "--oversubscribe-gpus",
            "--gpu-memory-utilization",
            "0.3",
            "--kv-cache-memory-bytes",
            "256M",
            *flags,
        ],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    answers = {
        int(line["custom_id"]): line["response"]["body"]["choices"][0]["token_ids"]
        for line in lines
    }
    return [answers[i] for i in sorted(answers)], json.loads(report.read_text())


def migration(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_requests(folder / "in.jsonl")
        still, _ = batch_run(args, folder, "still", 2, "--migrate", "never")
        # "auto" is by MPI where that works, and through pinned memory where it does not.
        ways = ("never", "auto") if args.direct else ("never",)
        found = {
            "by MPI" if way == "auto" else "through the host": moved(args, folder, still, way)
            for way in ways
        }
    return {"ok": all(one["ok"] for one in found.values()), **found}


def write_requests(file: Path) -> None:
    rng = random.Random(1)
    with open(file, "w") as requests:
        for i in range(24):
            prompt = [rng.randrange(3, 250) for _ in range(rng.randint(20, 300))]
            body = {
                "prompt": prompt,
                "max_tokens": 150,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            line = {"custom_id": str(i), "method": "POST", "url": "/v1/completions"}
            requests.write(json.dumps({**line, "body": body}) + "\n")


def moved(
    args: argparse.Namespace, folder: Path, still: list[list[int]], device_buffers: str
) -> dict[str, Any]:
    """The same requests, moved at random; with checksums where they can be had."""
    checksums = "always" if device_buffers == "never" else "auto"
    answers, report = batch_run(
        args,
        folder,
        f"moved-{device_buffers}",
        3,
        "--migrate",
        "stress",
        "--policy",
        "worst_fit",
        "--rebalance-every-s",
        "0.03",
        "--checksums",
        checksums,
        "--device-buffers",
        device_buffers,
    )
    alike, moves = same_tokens(still, answers), report["migrations"]
    return {
        "ok": alike["answers_alike"] >= 0.9 * alike["answers"] and moves["transfer"] > 0,
        **alike,
        "migrations": moves,
        "outcomes": report["migration_outcomes"],
        "migrated_bytes": report["migrated_bytes"],
        "prediction_error": report["migration_prediction_error"],
        "downtime_ms": report["downtime_ms"],
        "tpot_ms": report["tpot_ms"],
    }


def roofline(args: argparse.Namespace) -> dict[str, Any]:
    return {"ok": True, **near_the_roof(args.device)}


CHECKS = {
    check.__name__: check for check in (self_test, doctor, bandwidth, tokens, migration, roofline)
}

# --- the whole -----------------------------------------------------------------------------------


def alone(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One check in a process of its own; what it found, or why it failed."""
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
    """What to serve: the default, or its shape where it is not to be had."""
    if model is not None:
        return model
    if rehearse:
        return TINY
    from mellmpi.models import resolve

    try:
        resolve(DEFAULT, CACHE)
    except ValueError as error:
        print(f"{error}; going on with random weights of its shape", file=sys.stderr)
        (folder / "like-smollm2.json").write_text(json.dumps(ITS_SHAPE))
        return f"random:{folder / 'like-smollm2.json'}"
    return DEFAULT


def gpu(device: str) -> dict[str, Any]:
    """What it is; the driver's version, too."""
    import torch

    if device == "cpu":
        return {"name": "none: rehearsed on the CPU"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        said = "nvidia-smi is not here"
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
            state = "holds" if found["ok"] else f"FAILS: {found.get('why', found)}"
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
