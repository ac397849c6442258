import gzip

import numpy as np
import pytest

from mellmpi.workload import gamma, load

UNIFORM = "arrival_s,prompt_tokens,output_tokens,model\n0.5,10,20,a\n1.5,1,2,b\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,10,20\r\n2023-11-16 18:17:04.9799610,1,2\r\n"
)
BURST_1 = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,GPT-4,10,20,30,API log\n6,GPT-4,7,0,7,API log\n7,ChatGPT,1,2,3,API log\n"
)
BURST_3 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "100.0,,3,GPT-4,10,20,30,API log\n102.5,s7,3,GPT-4,1,2,3,Conversation log\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 10, "output_length": 20, "hash_ids": [1]}\n'
    '{"timestamp": 250, "input_length": 1, "output_length": 2, "hash_ids": []}\n'
)
JSONL = '{"arrival_s":0.0,"prompt_tokens":10,"output_tokens":20}\n' * 2


def written(tmp_path, text):
    path = tmp_path / "trace"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "last_s"),
    [(UNIFORM, 1.5), (AZURE, 1.000001), (BURST_1, 2.0), (BURST_3, 2.5), (MOONCAKE, 0.25)],
)
def test_a_public_format_is_recognised_by_its_columns(tmp_path, text, last_s):
    found = load(written(tmp_path, text))
    assert found.prompt_tokens.tolist() == [10, 1] and found.output_tokens.tolist() == [20, 2]
    assert found.arrival_s[-1] == pytest.approx(last_s)


def test_a_gzipped_trace_reads_like_the_plain_one(tmp_path):
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(UNIFORM.encode()))
    assert load(path).model == ("a", "b")


def test_failed_requests_of_burstgpt_are_dropped_and_counted(tmp_path):
    found = load(written(tmp_path, BURST_1))
    assert (len(found), found.dropped) == (2, 1)


def test_sessions_are_kept_where_the_trace_has_them(tmp_path):
    assert load(written(tmp_path, BURST_3)).session == ("", "s7")


HEAD = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        (HEAD + "1,2,3\n0.5,2,3\n", 3, "sort"),
        (HEAD + "-1,2,3\n", 2, "0 or more"),
        (HEAD + "nan,2,3\n", 2, "0 or more"),
        (HEAD + "1,0,3\n", 2, "at least one"),
        (HEAD + "1,2,-3\n", 2, "at least one"),
        (HEAD + "1,x,3\n", 2, "whole number"),
        (HEAD + "1,2.5,3\n", 2, "whole number"),
        (HEAD + "1,2\n", 2, "missing"),
        (HEAD, 1, "no requests"),
        ("", 1, "no requests"),
        ("a,b\n1,2\n", 2, "Known formats"),
        (JSONL + "{oops\n", 3, "no JSON"),
        (JSONL + "[1]\n", 3, "one JSON object"),
        (JSONL + '{"arrival_s": 1, "prompt_tokens": true, "output_tokens": 1}\n', 3, "missing"),
    ],
)
def test_a_bad_trace_is_refused_with_file_and_line(tmp_path, text, line, hint):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=hint) as error:
        load(path)
    assert f"{path}, line {line}:" in str(error.value)


@pytest.mark.parametrize("content", [b"\x1f\x8bnot gzip", b"\xff\xfe\x00", b"\x1f\x8b"])
def test_what_is_no_text_is_refused_by_name(tmp_path, content):
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        load(path)


def test_a_scaled_rate_compresses_time_and_nothing_else(tmp_path):
    slow = load(written(tmp_path, UNIFORM))
    fast = slow.faster(4.0)
    assert (fast.arrival_s * 4 == slow.arrival_s).all()
    assert (fast.prompt_tokens == slow.prompt_tokens).all()
    with pytest.raises(ValueError, match="--rate-scale"):
        slow.faster(0)


def test_generated_arrivals_have_the_rate_and_variation_that_was_asked_for():
    gaps = np.diff(gamma(20_000, rate=4.0, cv=3.0, prompt=100, output=50, seed=1).arrival_s)
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.1)


def test_one_seed_gives_one_workload():
    a, b = (gamma(50, 1.0, 1.0, 100, 50, seed=7) for _ in range(2))
    assert (a.arrival_s == b.arrival_s).all() and (a.prompt_tokens == b.prompt_tokens).all()
