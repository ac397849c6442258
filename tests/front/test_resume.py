"""A restart does only what the output file does not answer yet."""

import json

import pytest

from mellmpi.front.resume import finished_ids


def line(custom_id, status=200, end="\n"):
    response = {"status_code": status, "request_id": "r", "body": {}}
    error = None if status == 200 else {"message": "no"}
    return json.dumps(
        {"id": "x", "custom_id": custom_id, "response": response, "error": error}
    ) + end  # fmt: skip


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


def test_without_output_nothing_is_finished(output):
    assert finished_ids(output) == frozenset() and not output.exists()


def test_successes_are_finished_and_the_file_is_left_alone(output):
    output.write_text(line("a") + line("b"))
    before = output.stat().st_ino
    assert finished_ids(output) == {"a", "b"}
    assert output.read_text() == line("a") + line("b") and output.stat().st_ino == before


def test_a_torn_last_line_is_cut_off(output):
    for torn in (line("b")[:20], line("b")[:-2], '{"custom_id"', "\x00" * 30):
        output.write_text(line("a") + torn)
        assert finished_ids(output) == {"a"}
        assert output.read_text() == line("a")


def test_a_whole_last_line_without_its_end_counts(output):
    output.write_text(line("a") + line("b", end=""))
    assert finished_ids(output) == {"a", "b"}
    assert output.read_text() == line("a") + line("b")


def test_failures_are_taken_out_so_that_they_run_again_without_a_second_line(output):
    output.write_text(line("a") + line("b", 400) + line(None, 400) + line("c"))
    assert finished_ids(output) == {"a", "c"}
    assert output.read_text() == line("a") + line("c")


@pytest.mark.parametrize(
    "text", ["precious notes\nand more\n", '{"custom_id": "a", "body": {}}\n', "[]\n", "7\n"]
)
def test_a_file_that_is_no_batch_output_is_left_as_it_is(output, text):
    output.write_text(text)
    with pytest.raises(ValueError, match=r"is no batch output \(line 1 is not a result\)"):
        finished_ids(output)
    assert output.read_text() == text


def test_binary_garbage_is_left_as_it_is(output):
    output.write_bytes(b"\xff\xfe\n\x00")
    with pytest.raises(ValueError, match="is no batch output"):
        finished_ids(output)
