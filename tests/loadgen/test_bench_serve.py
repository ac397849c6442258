"""`bench serve` against a small server: flags, banner, JSON, failures."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from mellmpi.cli import main
from mellmpi.loadgen import BenchOptions
from mellmpi.loadgen.banner import banner
from mellmpi.loadgen.datasets import Prompt
from mellmpi.loadgen.figures import figures
from mellmpi.loadgen.run import Run
from mellmpi.loadgen.session import Session
from tests.loadgen.fake_server import Fake, serving

SMALL = ["--num-prompts", "8", "--random-input-len", "5", "--random-output-len", "6"]
# Rows and keys of vLLM's serving benchmark (vllm/benchmarks/serve.py).
ROWS = """
============ Serving Benchmark Result ============
Successful requests:
Failed requests:
Maximum request concurrency:
Request rate configured (RPS):
Benchmark duration (s):
Total input tokens:
Total generated tokens:
Request throughput (req/s):
Request goodput (req/s):
Output token throughput (tok/s):
Peak output token throughput (tok/s):
Peak concurrent requests:
Total token throughput (tok/s):
---------------Time to First Token----------------
Mean TTFT (ms):
Median TTFT (ms):
P99 TTFT (ms):
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):
Median TPOT (ms):
P99 TPOT (ms):
---------------Inter-token Latency----------------
Mean ITL (ms):
Median ITL (ms):
P99 ITL (ms):
----------------End-to-end Latency----------------
Mean E2EL (ms):
Median E2EL (ms):
P99 E2EL (ms):
==================================================
""".strip().splitlines()
KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts"),
    *("request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed"),
    *("total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput"),
    *("output_throughput", "total_token_throughput", "max_output_tokens_per_s"),
    "max_concurrent_requests",
    *(
        f"{kind}_{metric}_ms"
        for kind in ("mean", "median", "std", "p99")
        for metric in ("ttft", "tpot", "itl", "e2el")
    ),
}
OURS = {"interrupted", "tokens_counted_by", "p99_send_lag_ms", "p99_loop_lag_ms"}
DETAILS = {
    *("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors"),
}


@pytest.fixture
def fake():
    with serving(Fake()) as server:
        yield server


def bench(fake, *more):
    return main(["bench", "serve", "--base-url", fake.url, *SMALL, *more])


def test_the_banner_has_the_rows_of_vllm_in_50_columns(fake, capsys):
    more = ["--request-rate", "1000", "--max-concurrency", "4", "--goodput", "ttft:1e6", "tpot:1e6"]
    assert bench(fake, *more) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:40].rstrip() if line[0] not in "-=" else line for line in lines] == ROWS
    values = {line[:40].rstrip(): line[41:] for line in lines if line[0] not in "-="}
    assert values["Successful requests:"] == f"{8:<10}"
    assert values["Request rate configured (RPS):"] == f"{1000:<10.2f}"
    assert values["Total generated tokens:"] == f"{48:<10}"
    assert values["Total input tokens:"] == f"{56:<10}"  # as the server counts: 7 each


def test_the_json_has_the_keys_of_vllm(fake, tmp_path):
    out = ["--save-result", "--result-dir", str(tmp_path / "new"), "--result-filename", "r.json"]
    more = ["--metadata", "tp=1", "gpu=none", "--label", "mine", "--metric-percentiles", "50,99.9"]
    assert bench(fake, *out, *more) == 0
    found = json.loads((tmp_path / "new" / "r.json").read_text())
    percentiles = {f"{p}_{m}_ms" for p in ("p50", "p99.9") for m in ("ttft", "tpot", "itl", "e2el")}
    expected = {key for key in KEYS if not key.startswith("p99_")} | percentiles
    assert found.keys() == expected | OURS | {"tp", "gpu"}
    assert (found["completed"], found["failed"], found["model_id"]) == (8, 0, "fake")
    assert found["total_output_tokens"] == 48 and found["request_rate"] == "inf"
    assert found["request_goodput"] is None and found["tokens_counted_by"] == {"usage": 8}


def test_details_are_saved_for_each_request(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench(fake, "--save-result", "--save-detailed", "--model", "org/name") == 0
    (path,) = tmp_path.glob("openai-infqps-name-*.json")
    found = json.loads(path.read_text())
    assert found.keys() == KEYS | OURS | DETAILS
    assert found["output_lens"] == [6] * 8 and found["generated_texts"] == ["a " * 6] * 8
    assert all(len(found[key]) == 8 for key in DETAILS)
    assert all(0 <= start_s <= found["duration"] for start_s in found["start_times"])


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_streams_of_several_tokens_a_chunk_are_counted_by_usage(fake, line_end, capsys):
    fake.line_end, fake.per_chunk = line_end, 4
    assert bench(fake, "--backend", "openai-chat") == 0
    assert f"{'Total generated tokens:':<40} {48:<10}" in capsys.readouterr().out


def test_without_usage_chunks_are_counted_and_that_is_said(fake, capsys):
    fake.with_usage, fake.per_chunk = False, 3
    assert bench(fake) == 0
    said = capsys.readouterr()
    assert f"{'Total generated tokens:':<40} {16:<10}" in said.out
    assert "each chunk of a stream counts as one token" in said.err


def test_a_server_that_does_not_stream_is_measured_by_whole_answers(fake, capsys):
    fake.streams = False
    assert bench(fake) == 0
    assert f"{'Total generated tokens:':<40} {16:<10}" in capsys.readouterr().out


def test_a_stream_may_end_without_a_finish_reason_and_a_blank_line(fake):
    fake.ends_bare = True
    assert bench(fake) == 0


def test_a_server_on_this_host_is_not_asked_by_a_proxy(fake, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert bench(fake) == 0


def test_bodies_have_the_fields_of_the_flags(fake):
    more = ["--temperature", "0", "--top-k", "5", "--served-model-name", "m", "--num-warmups", "2"]
    extra = ["--extra-body", '{"stream_options": null, "min_tokens": 3}', "--no-ignore-eos"]
    header = ["--header", "Authorization=Bearer x", "X-A=b"]
    assert bench(fake, *more, *extra, *header) == 0
    assert len(fake.bodies) == 10  # with two to warm up
    body = fake.bodies[-1]
    assert body.pop("prompt")
    assert body == {
        **{"model": "m", "max_tokens": 6, "stream": True},
        **{"temperature": 0.0, "top_k": 5, "min_tokens": 3},
    }
    assert fake.headers[-1]["Authorization"] == "Bearer x" and fake.headers[-1]["X-A"] == "b"


def test_chat_bodies_have_messages_and_the_key_is_sent(fake, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert bench(fake, "--backend", "openai-chat") == 0
    (message,) = fake.bodies[0]["messages"]
    assert message["role"] == "user" and len(message["content"].split()) == 5
    assert fake.bodies[0]["ignore_eos"] and fake.bodies[0]["model"] == "fake"
    assert fake.headers[0]["Authorization"] == "Bearer secret"


def test_token_ids_are_sent_as_ids(fake):
    assert bench(fake, "--prompt-form", "ids") == 0
    assert all(len(body["prompt"]) == 5 for body in fake.bodies)
    assert len({headers["x-request-id"] for headers in fake.headers}) == 8


def test_a_trace_is_played(fake, tmp_path, capsys):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,3,2\n0.01,4,5\n")
    code = main(
        [
            *("bench", "serve", "--base-url", f"{fake.url}/v1/", "--dataset-name", "trace"),
            *("--dataset-path", str(path)),
        ]
    )
    assert code == 0 and [body["max_tokens"] for body in fake.bodies] == [2, 5]
    assert [len(body["prompt"].split()) for body in fake.bodies] == [3, 4]
    assert "uniform format" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"status": lambda n: 503}, "8 of 8 requests failed: HTTP 503 (no, "),
        ({"cut_after": 2}, "8 of 8 requests failed: the server closed the connection"),
        ({"error_after": 2}, "8 of 8 requests failed: error in the answer (out of blocks)"),
    ],
)
def test_a_run_in_which_all_fails_says_why_and_exits_with_1(fake, behaviour, said, capsys):
    vars(fake).update(behaviour)
    assert bench(fake) == 1
    found = capsys.readouterr()
    assert said in found.err and f"{'Failed requests:':<40} {8:<10}" in found.out


def test_some_failures_are_counted_and_the_rest_is_measured(fake, tmp_path, capsys):
    fake.status = lambda number: 429 if number in (2, 5, 6) else 200
    out = tmp_path / "r.json"
    assert bench(fake, "--save-result", "--save-detailed", "--result-filename", str(out)) == 0
    assert "3 of 8 requests failed: HTTP 429 (no, " in capsys.readouterr().err
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (5, 3, 30)
    assert sum(error.startswith("HTTP 429: no, ") for error in found["errors"]) == 3


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_drawn(fake, tmp_path, suffix):
    fake.status = lambda number: 500 if number == 3 else 200
    path = tmp_path / f"run.{suffix}"
    assert bench(fake, "--plot", str(path)) == 0
    drawn = path.read_bytes()
    assert drawn.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in drawn


def test_the_picture_of_a_run_without_answers_is_drawn(fake, tmp_path):
    fake.status = lambda number: 500
    assert bench(fake, "--plot", str(tmp_path / "run.png")) == 1
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_equal_gaps_are_saved_as_json(fake, tmp_path):
    out = tmp_path / "r.json"
    gaps = ["--request-rate", "1000", "--burstiness", "inf"]
    assert bench(fake, *gaps, "--save-result", "--result-filename", str(out)) == 0
    assert json.loads(out.read_text(), parse_constant=pytest.fail)["burstiness"] == "inf"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("more", [[], ["--disable-tqdm"]])
def test_a_terminal_shows_progress(fake, monkeypatch, more):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fake.status = lambda number: 500 if number == 0 else 200
    assert bench(fake, "--max-concurrency", "1", *more) == 0
    assert ("8/8" in terminal.getvalue()) == (not more)
    assert ("1 failed" in terminal.getvalue()) == (not more)


def test_no_server_is_an_error_that_says_what_to_type(capsys, tmp_path):
    plot = tmp_path / "run.png"
    assert main(["bench", "serve", "--port", "1", *SMALL, "--plot", str(plot)]) == 2
    said = capsys.readouterr().err
    assert "no server answers at http://127.0.0.1:1 (connection refused)" in said
    assert "--base-url http://HOST:PORT" in said
    assert not plot.exists()


def test_the_ready_check_waits_until_a_request_is_answered(fake, monkeypatch):
    monkeypatch.setattr("mellmpi.loadgen.session.READY_EVERY_S", 0.0)
    fake.status = lambda number: 503 if number < 3 else 200
    assert bench(fake, "--ready-check-timeout-sec", "100") == 0
    assert len(fake.bodies) == 3 + 1 + 8


def test_the_ready_check_gives_up_with_the_reason(fake, monkeypatch, capsys):
    monkeypatch.setattr("mellmpi.loadgen.session.READY_EVERY_S", 0.0)
    fake.status = lambda number: 503
    assert bench(fake, "--ready-check-timeout-sec", "0.01") == 2
    assert (
        "answers no request within --ready-check-timeout-sec: HTTP 503" in capsys.readouterr().err
    )


def test_an_interrupt_prints_what_was_measured():
    with serving(Fake(hangs_from=5)) as fake:
        command = [sys.executable, "-m", "mellmpi", "bench", "serve", "--base-url", fake.url]
        with subprocess.Popen(
            [*command, *SMALL, "--max-concurrency", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as running:
            assert fake.hanging.wait(60)
            os.kill(running.pid, signal.SIGINT)
            out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert f"{'Successful requests:':<40} {5:<10}" in out
    assert f"{'Interrupted requests:':<40} {1:<10}" in out
    assert "interrupted" in err and "Traceback" not in err


def test_an_interrupt_before_the_run_ends_the_wait_for_the_server():
    options = BenchOptions(port=1, ready_check_timeout_sec=1000.0)

    async def run():
        stop = asyncio.Event()
        session = Session(options, [Prompt("a", 1, 1)], np.zeros(1), None, lambda line: None)
        asyncio.get_running_loop().call_later(0.01, stop.set)
        return await session.run(stop, lambda run: None)

    assert asyncio.run(run()).is_interrupted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--goodput", "ttft"], "--goodput"),
        (["--goodput", "itl:5"], "ttft, tpot, e2el"),
        (["--percentile-metrics", "ttft,speed"], "'speed' is not one of"),
        (["--metric-percentiles", "101"], "0 to 100"),
        (["--extra-body", "[]"], "JSON object"),
        (["--header", "nothing"], "KEY=VALUE"),
        (["--dataset-name", "custom"], "needs --dataset-path"),
        (["--dataset-path", "x"], "goes with --dataset-name sharegpt"),
        (["--rate-scale", "2"], "goes with --dataset-name trace"),
        (["--dataset-name", "trace", "--dataset-path", "x", "--request-rate", "2"], "--rate-scale"),
        (["--custom-output-len", "3"], "goes with --dataset-name custom"),
        (["--burstiness", "2"], "goes with --request-rate"),
        (["--save-detailed"], "goes with --save-result"),
        (["--plot", "x.txt"], "one of .png"),
        (["--save-result", "--result-dir", "/proc/no"], "/proc/no cannot be written"),
        (["--dataset-name", "trace", "--dataset-path", "x", "--disable-shuffle"], "or custom"),
        (["--plot", "/no/such/x.png"], "no directory"),
        (["--base-url", "host:8000"], "http://127.0.0.1:8000"),
        (["--base-url", "http://h:x"], "http://127.0.0.1:8000"),
        (["--endpoint", "v1"], "must begin with /"),
        (["--prompt-form", "ids", "--backend", "openai-chat"], "--backend openai"),
        (["--tokenizer", "/no/such/"], "--tokenizer"),
        (["--request-rate", "0"], "--request-rate"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--trust-me"], "--help"),
    ],
)
def test_a_mistake_is_named_with_what_to_type_instead(arguments, said, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["bench", "serve", "--port", "1", *arguments]) == 2
    found = capsys.readouterr()
    assert said in found.err and not found.out


@pytest.mark.parametrize("before", [["--seed", "1"], ["--model", "tiny"]])
def test_the_command_must_precede_its_flags(before, capsys):
    assert main([*before, "bench", "serve"]) == 2
    assert "write the command first" in capsys.readouterr().err


def test_the_address_may_be_given_in_several_ways():
    assert BenchOptions(host="::1", port=9).url == "http://[::1]:9/v1/completions"
    assert BenchOptions(base_url="https://h/v1/").server == "https://h"
    assert BenchOptions(base_url="http://h/p", endpoint="/x").url == "http://h/p/x"
    assert BenchOptions(backend="openai-chat").url.endswith(":8000/v1/chat/completions")


def test_a_banner_without_options_has_no_row_for_them():
    text = banner(figures(Run(), [], [99.0]), BenchOptions(percentile_metrics=("ttft",)))
    assert "concurrency:" not in text and "configured" not in text and "TPOT" not in text
    assert "goodput" not in text and "Interrupted" not in text
    assert all(len(line) <= 51 for line in text.splitlines())
