import json
import os
import subprocess
import sys

import pytest

from mellmpi.cli import main
from mellmpi.cli.values import sizes_by_model

TRACE = "arrival_s,prompt_tokens,output_tokens,model\n" + "".join(
    f"{i / 2},{40 + i % 7},{60 + i % 11},{'ab'[i % 2]}\n" for i in range(60)
)
GIB = str(400 / 2**30)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return str(path)


def simulate(trace, *more):
    return main(["simulate", "--trace", trace, "--gpu-kv-gib", GIB, "--ideal", *more])


FIGURES = {
    "gpus_mean",
    "gpus_peak",
    "gpus_over_bound",
    "utilization",
    "migrations",
    "migrations_per_request",
    "migrated_bytes",
    "migrated_bytes_per_kv_byte",
    "preemptions",
    "stall_mean_s",
    "stall_p99_s",
    "wakes",
    "decisions_per_s",
    "wall_s",
}


def test_the_report_has_every_figure_of_every_policy_and_the_plot_is_drawn(trace, tmp_path, capsys):
    out, plot = tmp_path / "o.json", tmp_path / "o.png"
    more = ["--policies", "best_fit,frugal", "--json", str(out), "--plot", str(plot)]
    assert simulate(trace, "--kv-bytes-per-token", "1", *more) == 0
    report = json.loads(out.read_text())
    assert set(report["policies"]) == {"best_fit", "frugal"}
    assert all(found.keys() >= FIGURES for found in report["policies"].values())
    assert report["requests"] == 60 and report["lower_bound"]["peak"] >= 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "frugal" in capsys.readouterr().out


def test_standard_error_describes_the_trace(trace, capsys):
    assert simulate(trace, "--kv-bytes-per-token", "1", "--policies", "best_fit") == 0
    said = capsys.readouterr().err
    assert said.startswith(f"mellmpi: {trace}: uniform format, times in seconds, 60 requests in ")
    assert said.count("\n") == 1


def test_without_ideal_steps_and_transfers_take_time(trace, tmp_path):
    out = tmp_path / "o.json"
    more = [
        "--no-ideal",
        "--model",
        "llama-2-7b",
        "--gpu-kv-gib",
        "1",
        "--profile",
        "H100",
        "--policies",
        "worst_fit,frugal",
        "--json",
        str(out),
    ]
    assert simulate(trace, *more) == 0
    report = json.loads(out.read_text())
    assert report["cost"]["step_s"] > 0
    for found in report["policies"].values():
        assert found.keys() >= FIGURES | {"ttft_p99_s", "tpot_mean_s"}
        assert found["finished"] == 60 and found["ttft_mean_s"] > 0


def test_hosts_says_which_gpu_hosts_which_model(trace, tmp_path):
    out = tmp_path / "o.json"
    more = ["--kv-bytes-per-token", "a=1,b=2", "--hosts", "a,b", "--policies", "worst_fit"]
    assert simulate(trace, *more, "--json", str(out)) == 0
    apart = json.loads(out.read_text())["policies"]
    assert simulate(trace, *more[:2], *more[4:], "--json", str(out)) == 0
    together = json.loads(out.read_text())["policies"]
    for name in apart:
        assert apart[name]["finished"] == 60
        assert apart[name]["gpus_mean"] > together[name]["gpus_mean"]


def test_several_models_share_blocks_without_ideal(trace, tmp_path, capsys):
    out = tmp_path / "o.json"
    known = ["--no-ideal", "--model", "a=llama-2-7b,b=llama-3-8b", "--gpu-kv-gib", "1"]
    more = ["--hosts", "a,b,a+b", "--policies", "frugal,mell", "--json", str(out)]
    assert simulate(trace, *known, *more) == 0
    found = json.loads(out.read_text())["policies"]
    assert all(figures["finished"] == 60 for figures in found.values())
    sizes = ["--kv-bytes-per-token", "a=10007,b=9973", "--gpu-kv-gib", "1", "--no-ideal"]
    report = tmp_path / "r.json"
    nothing = {"samples": 0, "xx": [], "xy": []}
    report.write_text(json.dumps({"costs": {n: nothing for n in ("steps", "transfers", "wakes")}}))
    assert simulate(trace, *sizes, "--cost-from", str(report)) == 2
    assert "multiple" in capsys.readouterr().err


def test_the_frontier_goes_from_few_bytes_to_few_gpus(trace, tmp_path):
    out, plot = tmp_path / "o.json", tmp_path / "o.png"
    more = ["--kv-bytes-per-token", "1", "--policies", "worst_fit", "--frontier"]
    assert simulate(trace, *more, "--json", str(out), "--plot", str(plot)) == 0
    frontier = json.loads(out.read_text())["frontier"]
    assert [point["thrift"] for point in frontier] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(point.keys() >= FIGURES for point in frontier)
    assert frontier[0]["migrated_bytes"] <= frontier[-1]["migrated_bytes"]


def test_with_too_few_gpus_requests_wait_and_the_stall_is_reported(trace, tmp_path):
    out, stalls = tmp_path / "o.json", []
    for gpus in ("1", "40"):
        more = ["--kv-bytes-per-token", "1", "--policies", "frugal", "--gpus", gpus]
        assert simulate(trace, *more, "--json", str(out)) == 0
        found = json.loads(out.read_text())["policies"]["frugal"]
        assert found["gpus_peak"] <= int(gpus) and found["finished"] == 60
        stalls.append(found["stall_mean_s"])
    assert stalls[0] > 2 > stalls[1]


def test_requests_that_no_gpu_can_hold_are_dropped_and_counted(tmp_path):
    path, out = tmp_path / "trace.csv", tmp_path / "o.json"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,10\n1,300,101\n2,300,100\n")
    more = ["--kv-bytes-per-token", "1", "--policies", "worst_fit", "--json", str(out)]
    assert simulate(str(path), *more) == 0
    report = json.loads(out.read_text())
    assert (report["requests"], report["dropped"]) == (2, 1)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("a,b\n1,2\n", 2),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,x,1\n", 3),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,0,1\n", 3),
        ("arrival_s,prompt_tokens,output_tokens\n-1,1,1\n", 2),
        ("arrival_s,prompt_tokens,output_tokens\n5,1,1\n4,1,1\n", 3),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,1\n", 3),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timest\n', 2),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n[1]\n', 2),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\nnan,1,1\n", 3),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,1e400,1\n", 3),
        ("arrival_s,prompt_tokens,output_tokens\n0,99999999999999999999,1\n", 2),
        ("arrival_s,prompt_tokens,output_tokens\n0,9000000000000000000,9000000000000000000\n", 2),
    ],
)
def test_a_bad_row_ends_with_file_and_line_and_exit_code_2(tmp_path, capsys, text, line):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    assert simulate(str(path), "--kv-bytes-per-token", "1") == 2
    said = capsys.readouterr().err
    assert f"{path}, line {line}" in said and said.count("\n") == 1


def test_models_differ_in_the_size_of_their_kv(trace, tmp_path):
    out = tmp_path / "o.json"
    more = ["--policies", "best_fit", "--json", str(out)]
    assert simulate(trace, "--kv-bytes-per-token", "a=1,b=2", *more) == 0
    assert json.loads(out.read_text())["policies"]["best_fit"]["finished"] == 60


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        ([], "--kv-bytes-per-token"),
        (["--model", "llama-9"], "llama-2-7b"),
        (["--kv-bytes-per-token", "0"], "--kv-bytes-per-token"),
        (["--kv-bytes-per-token", "1000"], "--gpu-kv-gib"),
        (["--kv-bytes-per-token", "a=1,c=1"], "'b'"),
        (["--kv-bytes-per-token", "1", "--policies", "magic"], "best_fit"),
        (["--kv-bytes-per-token", "1", "--gpus", "0"], "--gpus"),
        (["--kv-bytes-per-token", "1", "--thrift", "2"], "--thrift"),
        (["--kv-bytes-per-token", "1", "--rate-scale", "-1"], "--rate-scale"),
        (["--kv-bytes-per-token", "1", "--trace", "/no/such"], "/no/such"),
        (["--kv-bytes-per-token", "1", "--no-ideal"], "--cost-from"),
        (["--model", "llama-2-7b", "--no-ideal", "--profile", "TPU"], "A100-40G"),
        (["--kv-bytes-per-token", "1", "--no-ideal", "--cost-from", "/no/such"], "/no/such"),
        (["--kv-bytes-per-token", "a=1,b=1", "--hosts", "a"], "'b'"),
        (["--kv-bytes-per-token", "a=1,b=1", "--hosts", "a+b,c"], "'c'"),
        (["--kv-bytes-per-token", "a=1,b=1", "--hosts", "a,b", "--gpus", "1"], "--gpus"),
        (["--kv-bytes-per-token", "1", "--json", "/no/such/dir/o.json"], "/no/such/dir"),
        (["--kv-bytes-per-token", "1", "--plot", "o.xyz"], ".png"),
        (["--kv-bytes-per-token", "1", "--json", "/"], "--json / is a directory"),
        (["--kv-bytes-per-token", "1", "--plot", "/no/such/dir/o.png"], "/no/such/dir"),
        (["--kv-bytes-per-token", "2G"], "--kv-bytes-per-token"),
        *(
            (["--kv-bytes-per-token", "1", flag, wrong], f"argument {flag}: '{wrong}' is no number")
            for flag in ("--gpu-kv-gib", "--tick-s", "--decode-rate", "--rate-scale", "--thrift")
            for wrong in ("nan", "inf", "1e300", "-1")
        ),
        (["--kv-bytes-per-token", "1", "--gpus", "100001"], "--gpus"),
        (["--kv-bytes-per-token", "1", "--tick-s", "1e-9"], "from 0.001 to 1e+09"),
        (["--kv-bytes-per-token", "1", "--seed", "-1"], "--seed"),
        (["--tracee", "x"], "--help"),
    ],
)
def test_a_wrong_flag_ends_with_a_hint_and_exit_code_2(trace, capsys, more, hint):
    assert simulate(trace, *more) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_the_trace_is_never_overwritten(tmp_path, capsys, flag):
    path = tmp_path / "trace.png"
    path.write_text(TRACE)
    assert simulate(str(path), "--kv-bytes-per-token", "1", flag, str(path)) == 2
    assert "are the same file" in capsys.readouterr().err and path.read_text() == TRACE


def test_the_report_of_a_run_is_never_overwritten(trace, tmp_path, capsys):
    report = tmp_path / "r.json"
    report.write_text("{}")
    more = ["--kv-bytes-per-token", "1", "--cost-from", str(report), "--json", str(report)]
    assert simulate(trace, *more) == 2
    assert "are the same file" in capsys.readouterr().err and report.read_text() == "{}"


def test_a_full_device_is_refused_before_the_trace_is_read(trace, capsys):
    assert simulate(trace, "--kv-bytes-per-token", "1", "--json", "/dev/full") == 2
    said = capsys.readouterr().err
    assert said.startswith("mellmpi: --json /dev/full cannot be written") and said.count("\n") == 1


def test_the_memory_of_a_gpu_must_be_given(trace, capsys):
    assert main(["simulate", "--trace", trace, "--kv-bytes-per-token", "1", "--ideal"]) == 2
    assert "simulate needs --gpu-kv-gib" in capsys.readouterr().err


def test_figures_and_picture_must_be_different_files_and_none_is_created(trace, tmp_path, capsys):
    out = tmp_path / "o.png"
    more = ["--kv-bytes-per-token", "1", "--json", str(out), "--plot", str(out)]
    assert simulate(trace, *more) == 2
    assert "are the same file" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("name", [b"$x^$.csv", b"\xff\x1b.csv"])
def test_a_trace_of_any_name_can_be_drawn(tmp_path, capsys, name):
    path, plot = tmp_path / os.fsdecode(name), tmp_path / "o.PNG"
    path.write_text(TRACE)
    more = ["--kv-bytes-per-token", "1", "--policies", "best_fit", "--plot", str(plot)]
    assert simulate(str(path), *more) == 0
    assert plot.read_bytes().startswith(b"\x89PNG") and "\x1b" not in capsys.readouterr().err


def test_sizes_are_for_all_models_or_by_name():
    assert sizes_by_model("512K") == {"": 524288}
    assert sizes_by_model("a=1,b=2K") == {"a": 1, "b": 2048}


def test_it_needs_neither_mpi_nor_torch():
    code = (
        "import sys; sys.modules.update(torch=None, mpi4py=None); "
        "from mellmpi.cli.parser import main; sys.exit(main(['simulate', '--trace', '/no/such']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_closed_standard_output_gives_no_traceback(trace):
    command = [sys.executable, "-m", "mellmpi", "simulate", "--trace", trace]
    command += ["--kv-bytes-per-token", "1", "--gpu-kv-gib", GIB, "--ideal"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_one_rank_of_a_job_simulates(trace, monkeypatch, capsys):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert simulate(trace, "--kv-bytes-per-token", "1") == 0
    assert capsys.readouterr() == ("", "")
