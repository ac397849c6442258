"""Runs requests that move at given times in given ways between two real workers, and measures them.

A job of three ranks (moving_rank.py) on one machine: the ranks share its clock.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHAPE = {  # much KV (32 KiB per token in float32) and little to compute
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 64,
    "vocab_size": 512,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FLAGS = ["--mca", "pml", "ob1", "--with-ft", "ulfm"]
LINKS = {  # flags of mpirun
    "shm": [*FLAGS, "--mca", "btl", "sm,self,tcp", "--map-by", ":OVERSUBSCRIBE"],
    # Rank 0 and worker 1 on the first host, worker 2 on the second.
    "1gbit": [*FLAGS, "--mca", "btl", "tcp,self", "-host", "10.78.0.1:2,10.78.0.2:1"],
    "10gbit": [*FLAGS, "--mca", "btl", "tcp,self", "-host", "10.78.0.1:2,10.78.0.2:1"],
}
WARM_UP_TOKENS = 12  # before each move, to measure the step time


def run(
    link: str,
    contexts: list[int],
    modes: list[str | None],
    repeats: int,
    others: int = 0,
    rates: dict[int, str] | None = None,
    crowded: tuple[int, ...] = (1, 2),
) -> list[dict[str, Any]]:
    """Run the job over this link. Returns one row per move.

    modes    alternate, since the load of the host changes; None: the scheduler chooses
    others   number of other requests that each crowded worker decodes
    rates    rate of the link between the two hosts from this repeat on, such as "1gbit"
    """
    job = {
        "contexts": contexts,
        "modes": modes,
        "repeats": repeats,
        "others": others,
        "crowded": crowded,
        "rates": rates or {},
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(SHAPE))
        (directory / "job.json").write_text(json.dumps(job))
        _mpirun(link, directory)
        rows: list[dict[str, Any]] = json.loads((directory / "rows.json").read_text())
        stamps = {w: json.loads((directory / f"tokens{w}.json").read_text()) for w in (1, 2)}
    for row in rows:
        row |= _pause(row, stamps)
        row |= {f"others_{end}": _others(row, stamps, row[end]) for end in ("src", "dst")}
    return rows


def _mpirun(link: str, directory: Path) -> None:
    """Run the three ranks over this link. CalledProcessError if they fail."""
    program = ["-n", "3", sys.executable, str(HERE / "moving_rank.py"), str(directory)]
    mpirun = ["bash", str(HERE / "two_hosts.sh"), "mpirun"]
    if link == "shm":
        local = str(Path(sys.executable).with_name("mpirun"))
        mpirun = [local, "--allow-run-as-root", "--bind-to", "none"]
    else:
        subprocess.run([str(HERE / "two_hosts.sh"), "up", link], check=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    try:
        subprocess.run(
            ["timeout", "-k", "5", "1800", *mpirun, *LINKS[link], *program],
            env=environment,
            check=True,
        )
    finally:
        if link != "shm":
            subprocess.run([str(HERE / "two_hosts.sh"), "down"], check=True)


def _pause(row: dict[str, Any], stamps: dict[int, list[Any]]) -> dict[str, float]:
    """Return the pause from last token at the source to first at the destination, and a step."""

    def of(worker: int) -> list[float]:
        return [at for request, at in stamps[worker] if request == row["request"]]

    first = min(at for at in of(row["dst"]) if at > row["began_s"])
    before = [at for at in of(row["src"]) if at < first]
    steps = [b - a for a, b in pairwise(before)]
    step_s = statistics.median(steps[-20:]) if steps else 0.0
    return {"pause_s": first - before[-1], "step_s": step_s}


def _others(row: dict[str, Any], stamps: dict[int, list[Any]], worker: int) -> list[float]:
    """Return seconds per token of the other requests before and during the move; [] if none.

    Before: since the first token of the moving request, which ends its prefill.
    """
    ready_s = min(at for request, at in stamps[row["src"]] if request == row["request"])
    times = sorted({at for request, at in stamps[worker] if request != row["request"]})
    steps = [(a, b - a) for a, b in pairwise(times)]
    began_s, ended_s = row["began_s"], row["began_s"] + row["took_s"]
    before = [step_s for at, step_s in steps if ready_s <= at < began_s][-WARM_UP_TOKENS:]
    during = [step_s for at, step_s in steps if began_s <= at < ended_s]
    return [statistics.mean(before), statistics.mean(during)] if before and during else []
