import json
import subprocess
import sys

import pytest

from mellmpi.cli import main, sizes_by_model

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
    "gpus_mean", "gpus_peak", "gpus_over_bound", "utilization", "migrations",
    "migrations_per_request", "migrated_bytes", "migrated_bytes_per_kv_byte", "preemptions",
    "stall_mean_s", "stall_p99_s", "wakes", "decisions_per_s", "wall_s",
}  # fmt: skip


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
        (["--kv-bytes-per-token", "1", "--no-ideal"], "--ideal"),
        (["--tracee", "x"], "--help"),
    ],
)
def test_a_wrong_flag_ends_with_one_clear_message_and_code_2(trace, capsys, more, hint):
    assert simulate(trace, *more) == 2
    assert hint in capsys.readouterr().err


def test_sizes_are_for_all_models_or_by_name():
    assert sizes_by_model("512K") == {"": 524288}
    assert sizes_by_model("a=1,b=2K") == {"a": 1, "b": 2048}


def test_it_needs_neither_mpi_nor_torch():
    code = (
        "import sys; sys.modules.update(torch=None, mpi4py=None); "
        "from mellmpi.cli import main; sys.exit(main(['simulate', '--trace', '/no/such']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
