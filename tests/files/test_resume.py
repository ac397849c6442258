"""A restart runs only the requests that the output file does not answer yet."""

import json
import os
import resource

import pytest

from mellmpi.files.resume import finished_ids, kept_path


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
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]  # no other file is left


def test_successes_are_finished_and_the_file_is_not_changed(output):
    output.write_text(line("a") + line("b"))
    before = output.stat().st_ino
    assert finished(output) == {"a", "b"}
    assert output.read_text() == line("a") + line("b") and output.stat().st_ino == before


def test_an_incomplete_last_line_is_removed(output):
    for torn in (line("b")[:20], line("b")[:-2], '{"custom_id"', "\x00" * 30):
        output.write_text(line("a") + torn)
        assert finished(output) == {"a"}
        assert output.read_text() == line("a")


def test_a_complete_last_line_without_its_line_end_counts(output):
    output.write_text(line("a") + line("b", end=""))
    assert finished(output) == {"a", "b"}
    assert output.read_text() == line("a") + line("b")


def test_failures_are_removed_so_that_they_run_again(output):
    output.write_text(line("a") + line("b", 400) + line(None, 400) + line("c"))
    assert finished(output) == {"a", "c"}
    assert output.read_text() == line("a") + line("c")


@pytest.mark.parametrize(
    "text", ["precious notes\nand more\n", '{"custom_id": "a", "body": {}}\n', "[]\n", "7\n"]
)
def test_a_file_that_is_not_a_batch_output_is_not_changed(output, text):
    output.write_text(text)
    with pytest.raises(ValueError, match=r"is not a batch output \(line 1 is not a result\)"):
        finished(output)
    assert output.read_text() == text


@pytest.mark.parametrize("text", ["one line without an end", '{"custom_id": "a"', "[", "\0"])
def test_one_line_without_line_end_that_is_not_an_answer_is_not_changed(output, text):
    output.write_text(text)
    with pytest.raises(ValueError, match="is not a batch output"):
        finished(output)
    assert output.read_text() == text


def test_an_incomplete_first_line_of_any_length_is_removed(output):
    whole = line("a").replace('"x"', '"batch_req_x"')
    for length in range(len(whole) - 2):
        output.write_text(whole[:length])
        assert finished(output) == frozenset()
        assert output.read_text() == ""


def test_inode_and_mode_stay_when_failures_are_removed(output):
    output.write_text(line("a", 400) + line("b"))
    output.chmod(0o640)
    before = output.stat()
    assert finished(output) == {"b"} and output.read_text() == line("b")
    after = output.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_answers_after_a_rewrite_are_appended_at_the_end(output):
    output.write_text(line("a", 400) + line("b"))
    descriptor = os.open(output, os.O_RDWR | os.O_APPEND)
    finished_ids(descriptor, str(output))
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, line("c").encode())
    os.close(descriptor)
    assert output.read_text() == line("b") + line("c")


def test_a_rewrite_killed_at_any_moment_is_repeated_and_loses_no_answer(output):
    old = line("failed", 400) + line("a") + line("b", 500) + line("c")
    kept = line("a") + line("c")
    for written in range(len(kept) + 1):
        output.write_text(kept[:written] + old[written:])
        with output.open() as stream:
            kept_path(stream.fileno(), str(output)).write_text(kept)
        assert finished(output) == {"a", "c"}
        assert output.read_text() == kept


def test_a_rewrite_killed_before_it_began_is_ignored(output):
    output.write_text(line("a", 400) + line("b"))
    with output.open() as stream:
        kept_path(stream.fileno(), str(output)).with_suffix(".part").write_text(line("b")[:9])
    assert finished(output) == {"b"} and output.read_text() == line("b")


def test_kept_lines_of_another_file_are_not_written_into_a_new_one(output):
    output.write_text(line("a"))
    with output.open() as stream:
        kept_path(stream.fileno(), str(output)).write_text(line("old") * 9)
    assert finished(output) == {"a"} and output.read_text() == line("a")


def test_an_unwritable_directory_loses_no_answer(output):
    text = line("a", 400) + line("b")
    output.write_text(text)
    descriptor = os.open(output, os.O_RDWR | os.O_APPEND)
    with pytest.raises(OSError, match="No such file"):
        finished_ids(descriptor, str(output.parent / "gone" / output.name))
    os.close(descriptor)
    assert output.read_text() == text


def test_a_full_disk_loses_no_answer_and_leaves_no_other_file(output):
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


def test_binary_garbage_is_not_changed(output):
    output.write_bytes(b"\xff\xfe\n\x00")
    with pytest.raises(ValueError, match="is not a batch output"):
        finished(output)
