"""A restart does only what the output file does not answer yet."""

import json
import os
import resource

import pytest

from mellmpi.frontend.resume import finished_ids, kept_path


def line(custom_id, status=200, end="\n"):
    response = {"status_code": status, "request_id": "r", "body": {}}
    error = None if status == 200 else {"message": "no"}
    return (
        json.dumps({"id": "x", "custom_id": custom_id, "response": response, "error": error}) + end
    )


def finished(output):
    descriptor = os.open(output, os.O_RDWR | os.O_APPEND)
    try:
        return finished_ids(descriptor, str(output))
    finally:
        os.close(descriptor)


@pytest.fixture
def output(tmp_path):
    yield tmp_path / "out.jsonl"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]  # nothing is left beside it


def test_successes_are_finished_and_the_file_is_left_alone(output):
    output.write_text(line("a") + line("b"))
    before = output.stat().st_ino
    assert finished(output) == {"a", "b"}
    assert output.read_text() == line("a") + line("b") and output.stat().st_ino == before


def test_a_torn_last_line_is_cut_off(output):
    for torn in (line("b")[:20], line("b")[:-2], '{"custom_id"', "\x00" * 30):
        output.write_text(line("a") + torn)
        assert finished(output) == {"a"}
        assert output.read_text() == line("a")


def test_a_whole_last_line_without_its_end_counts(output):
    output.write_text(line("a") + line("b", end=""))
    assert finished(output) == {"a", "b"}
    assert output.read_text() == line("a") + line("b")


def test_failures_are_taken_out_so_that_they_run_again_without_a_second_line(output):
    output.write_text(line("a") + line("b", 400) + line(None, 400) + line("c"))
    assert finished(output) == {"a", "c"}
    assert output.read_text() == line("a") + line("c")


@pytest.mark.parametrize(
    "text", ["precious notes\nand more\n", '{"custom_id": "a", "body": {}}\n', "[]\n", "7\n"]
)
def test_a_file_that_is_no_batch_output_is_left_as_it_is(output, text):
    output.write_text(text)
    with pytest.raises(ValueError, match=r"is no batch output \(line 1 is not a result\)"):
        finished(output)
    assert output.read_text() == text


@pytest.mark.parametrize("text", ["one line without an end", '{"custom_id": "a"', "[", "\0"])
def test_one_line_without_its_end_that_is_no_answer_is_left_as_it_is(output, text):
    output.write_text(text)
    with pytest.raises(ValueError, match="is no batch output"):
        finished(output)
    assert output.read_text() == text


def test_a_torn_first_line_is_cut_off_however_short_it_is(output):
    whole = line("a").replace('"x"', '"batch_req_x"')
    for length in range(len(whole) - 2):
        output.write_text(whole[:length])
        assert finished(output) == frozenset()
        assert output.read_text() == ""


def test_the_file_stays_the_same_file_when_failures_are_taken_out(output):
    output.write_text(line("a", 400) + line("b"))
    output.chmod(0o640)
    before = output.stat()
    assert finished(output) == {"b"} and output.read_text() == line("b")
    after = output.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_what_is_appended_after_a_rewrite_goes_to_the_end(output):
    output.write_text(line("a", 400) + line("b"))
    descriptor = os.open(output, os.O_RDWR | os.O_APPEND)
    finished_ids(descriptor, str(output))
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, line("c").encode())
    os.close(descriptor)
    assert output.read_text() == line("b") + line("c")


def test_a_rewrite_that_was_killed_at_any_moment_is_done_again_and_loses_no_answer(output):
    old = line("failed", 400) + line("a") + line("b", 500) + line("c")
    kept = line("a") + line("c")
    for written in range(len(kept) + 1):
        output.write_text(kept[:written] + old[written:])
        with output.open() as stream:
            kept_path(stream.fileno(), str(output)).write_text(kept)
        assert finished(output) == {"a", "c"}
        assert output.read_text() == kept


def test_a_rewrite_that_was_killed_before_it_began_is_forgotten(output):
    output.write_text(line("a", 400) + line("b"))
    with output.open() as stream:
        kept_path(stream.fileno(), str(output)).with_suffix(".part").write_text(line("b")[:9])
    assert finished(output) == {"b"} and output.read_text() == line("b")


def test_what_was_kept_of_another_file_is_not_put_into_a_new_one(output):
    output.write_text(line("a"))
    with output.open() as stream:
        kept_path(stream.fileno(), str(output)).write_text(line("old") * 9)
    assert finished(output) == {"a"} and output.read_text() == line("a")


def test_where_nothing_can_be_written_beside_it_no_answer_is_lost(output):
    text = line("a", 400) + line("b")
    output.write_text(text)
    descriptor = os.open(output, os.O_RDWR | os.O_APPEND)
    with pytest.raises(OSError, match="No such file"):
        finished_ids(descriptor, str(output.parent / "gone" / output.name))
    os.close(descriptor)
    assert output.read_text() == text


def test_a_full_disk_loses_no_answer_and_leaves_nothing_beside_the_file(output):
    text = line("a", 400) + line("b") * 99
    output.write_text(text)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            finished(output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert output.read_text() == text


def test_binary_garbage_is_left_as_it_is(output):
    output.write_bytes(b"\xff\xfe\n\x00")
    with pytest.raises(ValueError, match="is no batch output"):
        finished(output)
