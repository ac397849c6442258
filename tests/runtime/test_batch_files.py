"""All files of a job are opened or refused before the model loads."""

import gzip
import os

import pytest

from mellmpi.config import Config, ModelConfig, Options, UsageError
from mellmpi.runtime.batch_files import open_files
from tests.runtime.jobs import line

ANSWER = '{"id": "x", "custom_id": "a", "response": {"status_code": 200}, "error": null}\n'


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text(line("a", prompt="x") + "\n" + line("b", prompt="y"))
    (tmp_path / "trace").write_text("arrival_s,prompt_tokens,output_tokens\n0,4,5\n")
    return tmp_path


def opened(command="run-batch", **files):
    config = Config(models=(ModelConfig(model="random:tiny-llama"),))
    return open_files(Options(command=command, config=config, **files))


def test_a_batch_knows_its_requests_and_the_answered_ones(place):
    (place / "out").write_text(ANSWER)
    found = opened(input_file="in", output_file="out", report="r.json", timeline="t.PNG")
    assert found.num_requests == 2 and found.finished == {"a"} and not found.is_quiet
    assert sorted(os.listdir()) == ["in", "out", "trace"]
    found.begin()(b"more\n")
    assert (place / "out").read_text() == ANSWER + "more\n"


def test_a_new_output_is_created_when_answers_begin(place):
    found = opened(input_file="in", output_file="out")
    assert not (place / "out").exists()
    found.begin()
    assert (place / "out").read_bytes() == b""


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"input_file": "none", "output_file": "out"}, "there is no such file"),
        ({"input_file": "in"}, "run-batch needs -i requests.jsonl and -o answers.jsonl"),
        ({"input_file": "in", "output_file": "no/out"}, "there is no directory"),
        ({"input_file": "in", "output_file": "trace"}, "is not a batch output"),
        ({"input_file": "in", "output_file": "./in"}, "are the same file"),
        ({"input_file": "in", "output_file": "out", "report": "out"}, "are the same file"),
        ({"input_file": "in", "output_file": "out", "timeline": "t.xyz"}, "must end with"),
        ({"input_file": "in", "output_file": "out", "timeline": "t"}, "one of .*png"),
        ({"input_file": "in", "output_file": "out", "report": "."}, "is a directory"),
        (
            {"input_file": "in", "output_file": "out", "trace_out": "no/t"},
            "there is no dir",
        ),
        ({"input_file": "in", "output_file": "out", "trace_out": "out"}, "are the same file"),
        ({"input_file": "in", "output_file": "-", "report": "/dev/stdout"}, "both go to standard"),
        ({"input_file": "cut.gz", "output_file": "out"}, "ends in the middle"),
        ({"replay": "none"}, "--replay none cannot be read"),
        ({"replay": "/dev/null"}, "is not a regular file"),
        ({"replay": "in"}, "unknown columns"),
        ({"replay": "trace", "output_file": "in"}, "a replay cannot continue it"),
        ({"replay": "trace", "report": "trace"}, "are the same file"),
    ],
)
def test_an_error_leaves_all_files_unchanged(place, files, what):
    (place / "cut.gz").write_bytes(gzip.compress(b"{}" * 99)[:-1])
    before = {name: (place / name).read_bytes() for name in os.listdir()}
    with pytest.raises(UsageError, match=what):
        opened(**files)
    assert {name: (place / name).read_bytes() for name in os.listdir()} == before


def test_an_output_keeps_its_failures_until_all_other_files_are_checked(place):
    text = ANSWER + ANSWER.replace("200", "400").replace('"a"', '"b"')
    (place / "out").write_text(text)
    with pytest.raises(UsageError):
        opened(input_file="in", output_file="out", report="no/report")
    assert (place / "out").read_text() == text
    opened(input_file="in", output_file="out")
    assert (place / "out").read_text() == ANSWER


def test_files_of_a_replay_and_of_the_demo(place):
    replayed = opened(replay="trace", output_file="out", report="r")
    assert replayed.num_requests == 1 and replayed.requests is None
    demo = opened("demo")
    assert demo.num_requests > 10 and demo.begin() is None


def test_other_names_of_standard_output_are_standard_output(place):
    for name in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        found = opened(input_file="in", output_file=name)
        assert found.output.descriptor == 1 and found.is_quiet
