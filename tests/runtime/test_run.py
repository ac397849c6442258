"""Complete runs under mpirun with a tiny model: output, exit codes and unchanged answers."""

import json
import subprocess
import time
from collections import Counter

import pytest

from tests.runtime.jobs import TINY, Run, answers, line, write_requests

NUM_REQUESTS = 144
REPORT_KEYS = {
    "requests",
    "completed",
    "failed",
    "wall_s",
    "prompt_tokens",
    "output_tokens",
    "output_throughput",
    "gpu_seconds_active",
    "gpu_seconds_total",
    "active_workers_mean",
    "active_workers_peak",
    "migrations",
    "migrated_bytes",
    "downtime_ms",
    "ttft_ms",
    "tpot_ms",
    "workers_lost",
}


def batch(tmp_path, num_ranks, name, *args, limit_s=240):
    """Run the requests of tmp_path/in.jsonl. Returns (answers, report)."""
    out, report = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
    directory = tmp_path / name
    directory.mkdir()
    done = Run(
        num_ranks,
        "run-batch",
        "-i",
        str(tmp_path / "in.jsonl"),
        "-o",
        str(out),
        "--report",
        str(report),
        *TINY,
        *args,
        directory=directory,
    ).wait(limit_s)
    assert done.code == 0, done.err
    return answers(out), json.loads(report.read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Requests, and their answers by one worker, without migrations."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    write_requests(tmp_path / "in.jsonl", NUM_REQUESTS, longest=320)
    found, report = batch(tmp_path, 2, "alone", "--migrate", "never")
    assert len(found) == NUM_REQUESTS and report["migrations"]["transfer"] == 0
    return tmp_path / "in.jsonl", found


def test_random_migrations_change_no_token(undisturbed, tmp_path):
    requests, expected = undisturbed
    (tmp_path / "in.jsonl").write_text(requests.read_text())
    # Small steps, so that there is time for many migrations.
    small = ("--max-num-batched-tokens", "64", "--rebalance-every-s", "0.003")
    moves = Counter()
    for run in range(6):  # the number of migrations per run depends on the machine
        found, report = batch(
            tmp_path, 4, f"stress{run}", "--migrate", "stress", "--policy", "worst_fit", *small
        )
        assert found == expected
        moves.update({way: report["migrations"][way] for way in ("transfer", "recompute", "split")})
        if moves.total() >= 200 and min(moves.values()) > 5:
            return
    raise AssertionError(f"too few moves to prove anything: {moves}")


def test_a_killed_worker_loses_no_answer(undisturbed, tmp_path):
    requests, expected = undisturbed
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    run = Run(
        4,
        "run-batch",
        "-i",
        str(requests),
        "-o",
        str(out),
        "--report",
        str(report),
        *TINY,
        "--policy",
        "worst_fit",
        directory=tmp_path,
    )
    until = time.monotonic() + 60
    while (not out.exists() or out.read_text().count("\n") < 5) and time.monotonic() < until:
        time.sleep(0.01)
    run.ranks()[2].kill()
    done = run.wait()
    assert done.code == 0, done.err
    assert answers(out) == expected
    assert json.loads(report.read_text())["workers_lost"] == 1


def test_the_report_has_every_figure(undisturbed, tmp_path):
    requests, expected = undisturbed
    (tmp_path / "in.jsonl").write_text(requests.read_text())
    picture = tmp_path / "timeline.png"
    found, report = batch(tmp_path, 3, "run", "--timeline", str(picture), "--request-rate", "60")
    assert found == expected
    assert report.keys() >= REPORT_KEYS
    assert report["completed"] == NUM_REQUESTS and report["failed"] == 0
    assert report["output_tokens"] == sum(map(len, expected.values()))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_lines_get_an_error_each_and_all_others_complete(tmp_path):
    tmp_path.joinpath("in.jsonl").write_bytes(
        b"\n".join(
            [
                line("good", prompt=[5, 6, 7], max_tokens=4).encode(),
                b'{"custom_id": "torn", "method"',
                line("stranger", prompt="x", model="gpt-17", max_tokens=4).encode(),
                line("endless", prompt=[5] * 100_000, max_tokens=4).encode(),
                line("negative", prompt="x", max_tokens=-1).encode(),
                bytes(range(128, 256)),
                line("last", prompt="y", max_tokens=4).encode(),
            ]
        )
    )
    out = tmp_path / "out.jsonl"
    done = Run(
        2, "run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(out), *TINY, directory=tmp_path
    ).wait()
    assert done.code == 0, done.err
    entries = [json.loads(text) for text in out.read_text().splitlines()]
    good = [e for e in entries if e["error"] is None]
    bad = [e for e in entries if e["error"] is not None]
    assert {e["custom_id"] for e in good} == {"good", "last"} and len(bad) == 5
    for entry in bad:
        assert entry["response"]["body"]["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_trace_is_replayed_with_its_lengths(num_ranks, tmp_path):
    trace, out, report = (tmp_path / name for name in ("trace.csv", "out.jsonl", "report.json"))
    rows = [f"{0.02 * i},{20 + i},{2 * (5 + i)}" for i in range(24)]
    trace.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows, "1,5000,9"]))
    done = Run(
        num_ranks,
        "run-batch",
        "--replay",
        str(trace),
        "-o",
        str(out),
        "--report",
        str(report),
        "--length-scale",
        "0.5",
        *TINY,
        directory=tmp_path,
    ).wait()
    assert done.code == 0, done.err
    assert "1 of 25 requests" in done.err
    assert done.err.count("uniform format, times in seconds, 25 requests in 1 s") == 1
    found, figures = answers(out), json.loads(report.read_text())
    assert {name: len(tokens) for name, tokens in found.items()} == {
        f"row-{i + 1}": 5 + i for i in range(24)
    }
    assert figures["lines"] == {"completed": 24, "failed": 1, "skipped": 0}
    assert figures["failures"] == {"too_long": 1}


def test_a_restart_runs_only_the_remaining_requests(tmp_path):
    write_requests(tmp_path / "in.jsonl", 6)
    whole, _ = batch(tmp_path, 2, "first")
    first = (tmp_path / "first.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "second.jsonl").write_text("".join(first[:2]) + first[2][:40])  # incomplete
    again, report = batch(tmp_path, 2, "second")
    assert again == whole and report["lines"] == {"completed": 4, "failed": 0, "skipped": 2}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_requests_from_a_pipe_are_answered_on_standard_output(num_ranks, tmp_path):
    read = subprocess.PIPE
    run = Run(num_ranks, *TINY, stdin=read, directory=tmp_path)
    text = line("a", prompt=[5, 6], max_tokens=3) + "\n" + line("b", prompt=[7], max_tokens=3)
    run.job.stdin.write(text.encode())
    run.job.stdin.close()
    done = run.wait()
    assert done.code == 0, done.err
    assert {json.loads(text)["custom_id"] for text in done.out.splitlines()} == {"a", "b"}


def test_the_demo_says_what_to_type_next(tmp_path):
    done = Run(3, "demo", *TINY, directory=tmp_path).wait()
    assert done.code == 0, done.err
    assert "run-batch -i" in done.err and " completed, " in done.err


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["run-batch"], "-i requests.jsonl"),
        (["run-batch", "--replay", "/no/such.csv"], "/no/such.csv cannot be read"),
        (["demo", "--model", "/no/such/model"], "--model takes"),
        (["--frobnicate"], "--help"),
    ],
)
def test_an_error_of_the_user_ends_with_one_message_and_code_2(num_ranks, args, hint, tmp_path):
    done = Run(num_ranks, *args, directory=tmp_path).wait()
    assert done.code == 2, done.err
    assert done.err.count("mellmpi:") == 1 and hint in done.err


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_trace_with_a_bad_row_ends_with_its_line_and_code_2(num_ranks, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(f"arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,{2**63},1\n")
    done = Run(num_ranks, "run-batch", "--replay", str(trace), directory=tmp_path).wait()
    assert done.code == 2, done.err
    assert done.err.count("mellmpi:") == 1
    assert f"{trace}, line 3: prompt_tokens is '{2**63}'" in done.err


def test_single_rank_worlds_of_srun_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    done = Run(1, directory=tmp_path).wait()
    assert done.code == 2 and "srun --mpi=pmix" in done.err


def test_several_models_give_the_answers_of_each_model_alone(tmp_path):
    models = ("random:tiny-llama", "random:tiny-qwen3")
    write_requests(tmp_path / "all.jsonl", 24, longest=90)
    lines = [json.loads(text) for text in (tmp_path / "all.jsonl").read_text().splitlines()]
    common = ("--dtype", "float32", "--threads", "1", "--max-num-batched-tokens", "64")

    def answered(name, num_ranks, entries, *args):
        directory, out = tmp_path / name, tmp_path / f"{name}.jsonl"
        directory.mkdir()
        (directory / "in.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
        done = Run(
            num_ranks,
            "run-batch",
            "-i",
            str(directory / "in.jsonl"),
            "-o",
            str(out),
            *common,
            *args,
            directory=directory,
        ).wait(120)
        assert done.code == 0, done.err
        return answers(out)

    alone = {}
    for i, model in enumerate(models):
        for entry in lines[i::2]:
            entry["body"]["model"] = model
        alone |= answered(f"alone-{i}", 1, lines[i::2], "--model", model)
    named = [arg for model in models for arg in ("--model", model)]
    sets = [arg for hosted in (models[0], ",".join(models)) for arg in ("--worker-models", hosted)]
    stress = ("--migrate", "stress", "--policy", "worst_fit", "--rebalance-every-s", "0.01")
    assert answered("together", 4, lines, *named, *sets, *stress) == alone and len(alone) == 24


def test_a_model_that_no_worker_hosts_is_an_error(tmp_path):
    named = ("--model", "random:tiny-llama", "--model", "random:tiny-qwen3")
    sets = ("--worker-models", "random:tiny-llama", "--worker-models", "random:tiny-qwen3")
    done = Run(1, "-i", "x", "-o", "y", *named, *sets, directory=tmp_path).wait()
    assert done.code == 2 and "hosts random:tiny-qwen3: start more ranks" in done.err
