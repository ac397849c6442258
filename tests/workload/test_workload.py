import gzip
import json
import os
import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mellmpi.cli.flags import TRACES
from mellmpi.workload import gamma, load, rows
from mellmpi.workload.formats import FORMATS, column_name, recognise
from tests.fuzz_traces import VALID, damaged, outcome

UNIFORM = "arrival_s,prompt_tokens,output_tokens,model\n0.5,10,20,a\n1.5,1,2,b\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,10,20\r\n2023-11-16 18:17:04.9799610,1,2\r\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,10,20\n2024-05-10 00:00:01+00:00,1,2\n"
)
AZURE_2025 = (
    "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
    "2024-10-15T12:00:00.269Z,0,10,20\n2024-10-15T12:00:05.819Z,1,1,2\n"
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
BAILIAN = (
    '{"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.125, "input_length": 10, '
    '"output_length": 20, "type": "text", "turn": 1, "hash_ids": [1089]}\n'
    '{"chat_id": 160, "parent_chat_id": 159, "timestamp": 62.5, "input_length": 1, '
    '"output_length": 2, "type": "search", "turn": 2, "hash_ids": []}\n'
)
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,20\n4.25,1,2\n"
JSONL = '{"arrival_s":0.0,"prompt_tokens":10,"output_tokens":20}\n' * 2
KNOWN = {  # text -> format, last arrival (s)
    UNIFORM: ("uniform", 1.5),
    JSONL: ("uniform", 0.0),
    AZURE: ("Azure", 1.000001),
    AZURE_2024: ("Azure", 0.99007),
    AZURE_2025: ("Azure", 5.55),
    BURST_1: ("BurstGPT", 2.0),
    BURST_3: ("BurstGPT", 2.5),
    MOONCAKE: ("Mooncake", 0.25),
    BAILIAN: ("Bailian", 1.375),
    VIDUR: ("Vidur", 4.25),
}


def written(tmp_path, text):
    path = tmp_path / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def columns(text):
    first = text.splitlines()[0]
    names = json.loads(first) if first.startswith("{") else first.split(",")
    return {column_name(name) for name in names}


@pytest.mark.parametrize("text", KNOWN)
def test_a_public_format_is_recognised_by_its_columns(tmp_path, text):
    found, (name, last_s) = load(written(tmp_path, text)), KNOWN[text]
    assert found.prompt_tokens[0] == 10 and found.output_tokens[0] == 20
    assert found.arrival_s[-1] == pytest.approx(last_s)
    assert f"/trace: {name} format, " in found.source


@pytest.mark.parametrize("text", KNOWN)
def test_every_known_header_fits_exactly_one_format(text):
    assert [form.name for form in FORMATS if form.fits(columns(text))] == [KNOWN[text][0]]


def test_columns_of_two_formats_are_refused():
    with pytest.raises(ValueError, match="of uniform and of Vidur"):
        recognise(columns(UNIFORM) | columns(VIDUR))


def test_the_error_names_the_one_missing_column():
    with pytest.raises(ValueError, match="uniform without arrival_s"):
        recognise({"prompt_tokens", "output_tokens"})


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_the_help_names_every_format(form):
    assert form.name in TRACES


@pytest.mark.parametrize(
    "header",
    [
        "\ufeffarrival_s,prompt_tokens,output_tokens",
        ' arrival_s , "prompt_tokens", "output_tokens" ',
        "Arrival_S,PROMPT_TOKENS,Output_tokens",
        "arrival_s;prompt_tokens;output_tokens",
        "arrival_s\tprompt_tokens\toutput_tokens",
        "\n\narrival_s,prompt_tokens,output_tokens\n\n  \n",
        "note,arrival_s,prompt_tokens,output_tokens",
        "arrival_s,prompt_tokens,output_tokens,,",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_headers_may_differ_in_case_spaces_separators_and_line_ends(tmp_path, header, end):
    row = header.strip().lower().replace("arrival_s", "1.5").replace("prompt_tokens", "7")
    row = row.replace("output_tokens", "9").strip("\ufeff")
    found = load(written(tmp_path, f"{header}\n{row}\n\n".replace("\n", end)))
    assert (found.arrival_s, found.prompt_tokens, found.output_tokens) == ([1.5], [7], [9])


def test_empty_lines_are_skipped(tmp_path):
    assert len(load(written(tmp_path, MOONCAKE.replace("{", "\n \n{")))) == 2


def test_columns_may_stand_in_any_order(tmp_path):
    found = load(written(tmp_path, "output_tokens,arrival_s,prompt_tokens\n9,1.5,7\n"))
    assert (found.arrival_s, found.prompt_tokens, found.output_tokens) == ([1.5], [7], [9])


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_the_source_names_a_separator_other_than_the_comma(tmp_path, separator, name):
    assert f"separated by {name}" in load(written(tmp_path, UNIFORM.replace(",", separator))).source
    assert "separated" not in load(written(tmp_path, UNIFORM)).source


@pytest.mark.parametrize(
    ("date", "after_s"),
    [
        ("2024-05-10 00:00:00", 0),
        ("2024-05-10T00:00:01", 1),
        ("2024-05-10 00:00:01Z ", 1),
        ("2024-05-10 00:00:01.5z", 1.5),
        ("2024-05-10t00:00:01.123456789+00:00", 1.123456789),
        ("2024-05-10 02:00:01+02:00", 1),
        ("2024-05-09 19:30:01.-0430", 1),
        ("2024-05-10 00:01", 60),
        ("2024-05-10 01:00+00", 3600),
    ],
)
def test_a_date_may_have_a_zone_and_up_to_nine_decimals(tmp_path, date, after_s):
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00Z,1,1\n"
    found = load(written(tmp_path, f"{head}{date},1,1\n"))
    assert found.arrival_s[1] == pytest.approx(after_s, abs=1e-6)


def test_a_gzipped_trace_reads_like_the_plain_one(tmp_path):
    assert load(written(tmp_path, gzip.compress(UNIFORM.encode()))).model == ("a", "b")


@pytest.mark.parametrize("data", [UNIFORM.encode(), gzip.compress(UNIFORM.encode())])
def test_a_trace_may_come_from_a_pipe_in_small_pieces(tmp_path, data):
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write():
        with path.open("wb", buffering=0) as pipe:
            for i in range(len(data)):
                pipe.write(data[i : i + 1])

    writer = threading.Thread(target=write)
    writer.start()
    assert load(path).model == ("a", "b")
    writer.join()


def test_failed_requests_of_burstgpt_are_dropped_and_counted(tmp_path):
    found = load(written(tmp_path, BURST_1))
    assert (len(found), found.dropped) == (2, 1)
    assert "1 failed left out" in found.source


def test_sessions_are_kept_where_the_trace_has_them(tmp_path):
    assert load(written(tmp_path, BURST_3)).session == ("", "s7")


def test_names_may_be_numbers_or_missing(tmp_path):
    rows = '{"arrival_s":0,"prompt_tokens":1,"output_tokens":1,"model":7}\n' + JSONL
    assert load(written(tmp_path, rows)).model == ("7", "", "")
    nameless = (
        AZURE.replace("Tokens\r", "Tokens,\r").replace("0,20", "0,20,x").replace("1,2", "1,2,")
    )
    assert load(written(tmp_path, nameless)).model == ("", "")


# --- units --------------------------------------------------------------------------------


def spaced(name, gap, num=40, tokens=1000):
    """A trace of one format, with equal gaps between its requests."""
    form = next(form for form in FORMATS if form.name == name)
    also = {form.also: 1} if form.also else {}
    lengths = {form.prompt: tokens, form.output: 1}
    rows = (json.dumps({form.arrival: i * gap, **lengths, **also}) for i in range(num))
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("name", "gap", "unit", "scale"),
    [
        ("Mooncake", 0.3, "seconds", "0.001"),  # 3,333 requests/s
        ("Mooncake", 3e5, "microseconds", "1000"),
        ("Mooncake", 3e8, "nanoseconds", "1000000"),
        ("Bailian", 300, "milliseconds", "1000"),
        ("uniform", 301, "milliseconds", "1000"),
        ("Vidur", 301, "milliseconds", "1000"),
    ],
)
def test_an_unlikely_load_is_reported_with_the_flag_that_corrects_it(
    tmp_path, name, gap, unit, scale
):
    path = written(tmp_path, spaced(name, gap))
    if name == "Mooncake" and gap == 3e8:
        path.write_text(spaced(name, gap, num=20))  # within 366 days in milliseconds
    source = load(path).source
    assert source.endswith(f"if the times are in {unit}, add --rate-scale {scale}")


@pytest.mark.parametrize(
    ("name", "gap", "tokens"),
    [
        ("Mooncake", 300, 13_000),
        ("Mooncake", 5, 1000),
        ("Mooncake", 10_000, 1000),
        ("Mooncake", 0, 1000),
        ("Bailian", 0.3, 1000),
        ("Bailian", 10, 1000),
        ("BurstGPT", 3000, 1000),
        ("uniform", 300, 1000),
        ("uniform", 0.001, 1000),
    ],
)
def test_a_likely_load_is_not_reported(tmp_path, name, gap, tokens):
    assert "unlikely" not in load(written(tmp_path, spaced(name, gap, tokens=tokens))).source


def test_many_tokens_a_second_are_as_unlikely_as_many_requests(tmp_path):
    assert "unlikely" in load(written(tmp_path, spaced("Mooncake", 10, tokens=60_000))).source


@pytest.mark.parametrize("name", ["Mooncake", "uniform"])
def test_no_trace_is_longer_than_366_days(tmp_path, name):
    path = written(tmp_path, spaced(name, 3.2e10, num=3))
    with pytest.raises(ValueError, match=r"line 2: \w+ is over 366 days after the start"):
        load(path)


def test_only_uniform_times_are_relative_to_zero(tmp_path):
    with pytest.raises(ValueError, match="line 1: arrival_s is over 366 days"):
        load(written(tmp_path, '{"arrival_s": 1.7e9, "prompt_tokens": 1, "output_tokens": 1}'))
    late = load(
        written(
            tmp_path,
            MOONCAKE.replace(": 0,", ": 1715299200000,").replace(": 250,", ": 1715299200250,"),
        )
    )
    assert late.arrival_s.tolist() == [0, 0.25]


def test_the_source_has_number_span_and_rate(tmp_path):
    found = load(written(tmp_path, spaced("uniform", 0.5, num=1001)))
    assert found.source.endswith("1,001 requests in 8.3 min (2 requests/s)")
    assert load(written(tmp_path, JSONL)).source.endswith("2 requests at once")
    fast = load(written(tmp_path, spaced("uniform", 1e-3, num=101)))
    assert fast.source.endswith("101 requests in 0.1 s (1,000 requests/s)")


# --- what is refused ------------------------------------------------------------------------------

HEAD = "arrival_s,prompt_tokens,output_tokens\n"
AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        (HEAD + "1,2,3\n0.5,2,3\n", 3, "sort"),
        (HEAD + "-1,2,3\n", 2, "0 or more"),
        (HEAD + "nan,2,3\n", 2, "arrival_s is 'nan'; a time in seconds"),
        (HEAD + "1e400,2,3\n", 2, "arrival_s is '1e400'"),
        (HEAD + "2024-05-10 00:00:00,2,3\n", 2, "arrival_s is '2024"),
        (HEAD + "1,0,3\n", 2, "at least one"),
        (HEAD + "1,2,-3\n", 2, "output_tokens is '-3'; .* at least one"),
        (HEAD + "1,x,3\n", 2, "whole number"),
        (HEAD + "1,2.5,3\n", 2, "whole number"),
        (HEAD + "1,0x10,3\n", 2, "whole number"),
        (HEAD + "1,1_000,3\n", 2, "whole number"),
        (HEAD + "1,１,3\n", 2, "whole number"),
        (HEAD + '1,"1,234",3\n', 2, "prompt_tokens is '1,234'"),
        (HEAD + "1, ,3\n", 2, "prompt_tokens is missing"),
        (HEAD + "1,2147483648,3\n", 2, "at most 2,147,483,647"),
        (HEAD + "1,2,99999999999999999999\n", 2, "output_tokens is '9{20}'; .* at most"),
        (HEAD + "1,2\n", 2, "'output_tokens' is missing"),
        (HEAD + "1,2,3,4\n", 2, "4 cells, but the header has 3"),
        (HEAD + '1,2,3\n\n2,2,"3\n', 4, "not closed"),
        (UNIFORM + '2,1,1,"c\n3,1,1,d\n', 4, "not closed"),
        (HEAD + '1,2,"' + "3" * 200_000, 2, "no CSV"),
        (HEAD + "1,2,3\n" + HEAD, 3, "arrival_s is 'arrival_s'"),
        ('"a' + "a" * 200_000, 1, "no CSV"),
        (HEAD, 1, "no requests"),
        ("", 1, "no requests"),
        ("\n\n", 1, "no requests"),
        ("a,b\n1,2\n", 2, "Known formats"),
        ("arrival_s," + HEAD + "1,1,1,1\n", 1, "two columns are named 'arrival_s'"),
        (AZURE_HEAD + "5,1,1\n", 2, "TIMESTAMP is '5'; a date"),
        (AZURE_HEAD + "2024-02-30 00:00:00,1,1\n", 2, "TIMESTAMP is"),
        (AZURE_HEAD + "2024-02-03 00:00:00.1234567890,1,1\n", 2, "TIMESTAMP is"),
        (AZURE_HEAD + "2024-02-03 00:00:00+25:00,1,1\n", 2, "TIMESTAMP is"),
        (AZURE_HEAD + "2024-02-03 00:00:00.１,1,1\n", 2, "TIMESTAMP is"),
        (BURST_1.replace(",20,", ",0,").replace(",2,", ",0,"), 1, "no requests"),
        (JSONL + "{oops\n", 3, "no JSON"),
        (JSONL + "[1]\n", 3, "one JSON object"),
        ("[" + JSONL.split()[0] + "]", 1, "one JSON object"),
        (JSONL + MOONCAKE, 3, "columns of Mooncake after"),
        (MOONCAKE + BAILIAN, 3, "columns of Bailian after"),
        (MOONCAKE + '{"timestamp": 9, "input_length": 1}\n', 3, "Mooncake without output_length"),
        (MOONCAKE.replace('"output', '"TIMESTAMP": 1, "output'), 1, "differ in case"),
        (MOONCAKE.replace(": 10", ": true"), 1, "input_length is True"),
        (MOONCAKE.replace(": 10", ": null"), 1, "input_length is missing"),
        (MOONCAKE.replace(": 10", ": [10]"), 1, "input_length is a list"),
        (MOONCAKE.replace(": 10", ": {}"), 1, "input_length is an object"),
        (MOONCAKE.replace(": 10", ": NaN"), 1, "input_length is nan"),
        (MOONCAKE.replace(": 10", ": 1" + "0" * 400), 1, "input_length is 10"),
        (MOONCAKE.replace(": 10", ': "' + "x" * 5000 + '"'), 1, "input_length is 'xxx"),
        (MOONCAKE.replace(": 10", ": " + "9" * 5000), 1, "too many digits"),
        (MOONCAKE.replace("[1]", "[" * 100_000), 1, "nested too deeply"),
        (JSONL.replace("}", ',"model":["a"]}'), 1, "model is a list"),
        (JSONL.replace("}", ',"model":"\\ud800"}'), 1, "model is"),
        (UNIFORM.replace(",b", ",é").encode("latin-1"), 3, "not UTF-8"),
        (UNIFORM.replace(",b", ",\0"), 3, "a NUL byte"),
        (UNIFORM.encode("utf-16-le"), 1, "a NUL byte"),
        (HEAD + "1,2,3" + " " * 2**24, 2, "over 16,777,216 characters"),
    ],
)
def test_a_bad_trace_is_refused_with_file_and_line(tmp_path, text, line, hint):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=hint) as error:
        load(path)
    assert f"{path}, line {line}:" in str(error.value)
    assert len(str(error.value)) < 600 + len(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"\x1f\x8bnot gzip", "method"),
        (b"\x1f\x8b", "ended"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + b"\xff" * 20, "decompressing"),
        (gzip.compress(UNIFORM.encode() * 99)[:60], "ended"),
        (UNIFORM.encode("utf-16"), "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"PK\x03\x04", "zip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ],
)
def test_a_file_that_is_not_text_is_refused_by_name(tmp_path, content, hint):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=f"{path} cannot be read: .*{hint}"):
        load(path)


def test_a_directory_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: Is a directory"):
        load(tmp_path)


def test_a_pipe_without_a_writer_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "FILLED_S", 0.0)
    os.mkfifo(tmp_path / "trace")
    with pytest.raises(ValueError, match=f"nothing comes from {tmp_path / 'trace'}"):
        load(tmp_path / "trace")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "trace"


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_by_name(scratch, data):
    outcome(scratch, data)


@settings(max_examples=400, deadline=None)
@given(valid=st.sampled_from(VALID), seed=st.integers(0, 2**32))
def test_a_damaged_trace_is_read_or_refused_by_name(scratch, valid, seed):
    outcome(scratch, damaged(random.Random(seed), valid))


# --- other loads --------------------------------------------------------------------------------


def test_a_scaled_rate_changes_only_arrival_times(tmp_path):
    slow = load(written(tmp_path, UNIFORM))
    fast = slow.faster(4.0)
    assert (fast.arrival_s * 4 == slow.arrival_s).all()
    assert (fast.prompt_tokens == slow.prompt_tokens).all()
    with pytest.raises(ValueError, match=r"--rate-scale"):
        slow.faster(0)


@pytest.mark.parametrize("factor", [1e-8, 5e-324])
def test_a_scaled_rate_spreads_requests_over_366_days_at_most(tmp_path, factor):
    with pytest.raises(ValueError, match=r"--rate-scale .* 366 days"):
        load(written(tmp_path, UNIFORM)).faster(factor)


@pytest.mark.parametrize("factor", [2e8, 1e308])
def test_a_scaled_length_has_the_limit_of_a_trace(tmp_path, factor):
    found = load(written(tmp_path, UNIFORM))
    assert found.longer(1e8).output_tokens.tolist() == [2_000_000_000, 200_000_000]
    with pytest.raises(ValueError, match=r"--length-scale .* 2,147,483,647"):
        found.longer(factor)


def test_generated_arrivals_have_the_given_rate_and_variation():
    gaps = np.diff(gamma(20_000, rate=4.0, cv=3.0, prompt=100, output=50, seed=1).arrival_s)
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.1)


def test_the_same_seed_gives_the_same_workload():
    a, b = (gamma(50, 1.0, 1.0, 100, 50, seed=7) for _ in range(2))
    assert (a.arrival_s == b.arrival_s).all() and (a.prompt_tokens == b.prompt_tokens).all()
