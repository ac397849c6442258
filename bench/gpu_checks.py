"""The checks of `device_checks.py`. Each returns plain data; "ok" says whether it passed."""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from alone import ROOT
from roofline import copies
from roofline import roofline as near_the_roof

HERE = Path(__file__).resolve().parent
CACHE = Path.home() / ".cache" / "mellmpi"
BLOCKS = 64  # of the copy check; 1 MiB each
MPIRUN = ["bash", str(ROOT / "launch" / "mpirun.sh")]


def launcher(num_ranks: int) -> list[str]:
    return [*MPIRUN, "-n", str(num_ranks), sys.executable]


def kind(device: str) -> str:
    """Return the value of `--device`."""
    return "cpu" if device == "cpu" else "cuda"


def self_test(args: argparse.Namespace) -> dict[str, Any]:
    from mellmpi.transport.blocks import device_buffers_work

    started_s = time.perf_counter()
    works = device_buffers_work(args.device, MPIRUN)  # with the messaging layer of jobs
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
    """Copy blocks through slots from one half of an arena to the other, as transfers do. Returns
    whether they are unchanged when `copy_done` is the only synchronisation."""
    import torch

    from mellmpi.transport.blocks import CudaCopies, DeviceArena, Staged

    arena = DeviceArena(2 * BLOCKS, 1 << 20, device)
    arena.blocks.random_(0, 256)
    torch.cuda.synchronize(device)
    staging = Staged(arena.block_bytes, CudaCopies(arena))

    def await_copies(addresses: list[int]) -> None:
        while not all(staging.copy_done(address) for address in addresses):
            time.sleep(50e-6)

    for first in range(0, BLOCKS, 4):
        addresses = [staging.send_address(block) for block in range(first, first + 4)]
        await_copies(addresses)
        for block, address in enumerate(addresses, first):
            staging.received(address, BLOCKS + block)
        await_copies(addresses)
        for address in addresses:
            staging.release(address)
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
    """Return greedy tokens in float32, `num_out` per prompt."""
    from mellmpi.config import BatchConfig, CacheConfig, ModelConfig
    from mellmpi.engine import build_executor
    from mellmpi.models import resolve
    from mellmpi.protocol import GREEDY, SCHEDULER, Assign, Request
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
    sampling = replace(GREEDY, max_tokens=num_out)
    name = executor.models[0].kv.model
    for i, prompt in enumerate(prompts):
        request = Request(i, name, tuple(prompt), sampling, None, 0, None)
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
    # A near-tie of two tokens may change one answer from there on.
    return {"ok": alike["answers_alike"] >= len(prompts) - 1, **alike}


def batch_run(
    args: argparse.Namespace, folder: Path, name: str, num_ranks: int, *flags: str
) -> tuple[list[list[int]], dict[str, Any]]:
    """Run `run-batch` on the device. Returns (answers in order, report)."""
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
        unmoved, _ = batch_run(args, folder, "unmoved", 2, "--migrate", "never")
        # "auto" sends by MPI if that works, else through pinned memory.
        ways = ("never", "auto") if args.direct else ("never",)
        found = {
            "by MPI" if way == "auto" else "through the host": moved(args, folder, unmoved, way)
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
    args: argparse.Namespace, folder: Path, unmoved: list[list[int]], device_buffers: str
) -> dict[str, Any]:
    """Run the same requests with random migrations, and checksums if the path allows them."""
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
    alike, moves = same_tokens(unmoved, answers), report["migrations"]
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
