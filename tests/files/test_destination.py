"""Outputs are checked for write access first, and the check leaves nothing behind."""

import os
import stat
import threading
from contextlib import ExitStack

import pytest

from mellmpi.config import UsageError
from mellmpi.files import Destination, Unwritable, check_different
from mellmpi.files.destination import write_all
from mellmpi.files.resume import kept_path

ANSWER = b'{"id": "x", "custom_id": "a", "response": {"status_code": 200}, "error": null}\n'


def destination(path, flag="-o"):
    return Destination(flag, str(path), str(path), os.O_RDWR if flag == "-o" else os.O_WRONLY)


def checked(path):
    with ExitStack() as created:
        return destination(path).check_writable(created)


def test_the_check_leaves_no_new_file_and_changes_no_old_one(tmp_path):
    (tmp_path / "old").write_text("text")
    (tmp_path / "link").symlink_to("target")
    for name in ("new", "link", "old"):
        assert stat.S_ISREG(checked(tmp_path / name).st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "old"]
    assert (tmp_path / "old").read_text() == "text" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (".", "is a directory"),
        ("no/such/out", "there is no directory"),
        ("x" * 256, "too long"),
        ("file/out", "Not a directory"),
        ("lost", "there is no directory"),
    ],
)
def test_an_unwritable_output_is_refused_and_nothing_is_left(tmp_path, name, what):
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to("no/such/file")
    with pytest.raises(UsageError, match=what):
        checked(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "lost"]


def test_a_pipe_without_a_reader_is_refused_with_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr("mellmpi.files.destination.READER_S", 0.0)
    os.mkfifo(tmp_path / "out put")
    with pytest.raises(UsageError, match=r"first type  cat '.*/out put' > FILE &"):
        checked(tmp_path / "out put")


def test_a_pipe_whose_reader_comes_a_little_later_is_written(tmp_path):
    os.mkfifo(tmp_path / "out")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "out").read_bytes()))
    reader.start()
    out = destination(tmp_path / "out")
    with ExitStack() as created:
        out.check_writable(created)
    assert out.resume() == frozenset()
    out.append(b"a" * (1 << 18))
    os.close(out.descriptor)
    reader.join()
    assert read == [b"a" * (1 << 18)]


def test_a_file_that_begins_anew_is_empty_and_grows_by_what_is_appended(tmp_path):
    (tmp_path / "out").write_text("of an earlier run")
    out = destination(tmp_path / "out")
    out.begin()
    assert (tmp_path / "out").read_bytes() == b""
    out.append(b"a")
    out.append(b"b")
    assert (tmp_path / "out").read_bytes() == b"ab"


def test_a_pipe_whose_reader_has_ended_is_reported():
    source, sink = os.pipe()
    os.close(source)
    with pytest.raises(Unwritable, match="-o p is a pipe whose reader has ended"):
        Destination("-o", "p", "p", descriptor=sink).append(ANSWER)
    os.close(sink)


def test_a_full_disk_is_reported():
    for write in (Destination.append, Destination.replace):
        out = destination("/dev/full", "--report")
        with ExitStack() as created:
            out.check_writable(created)
        with pytest.raises(Unwritable, match="--report /dev/full cannot be written: No space left"):
            write(out, ANSWER)


def test_all_bytes_are_written_to_a_non_blocking_descriptor():
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    data, found = bytes(range(256)) * 4096, []

    def read():
        while piece := os.read(source, 1 << 16):
            found.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    write_all(sink, data)
    os.close(sink)
    reader.join()
    os.close(source)
    assert b"".join(found) == data


def test_answers_are_appended_through_links_and_the_links_stay(tmp_path):
    (tmp_path / "real").write_bytes(ANSWER)
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "soft").symlink_to("real")
    os.link(tmp_path / "real", tmp_path / "hard")
    failed = ANSWER.replace(b"200", b"400").replace(b'"a"', b'"b"')
    for number, name in enumerate(("soft", "hard", "real"), start=1):
        with (tmp_path / "real").open("ab") as stream:
            stream.write(failed)
        out = destination(tmp_path / name)
        assert out.resume() == {"a"}
        out.append(ANSWER)
        os.close(out.descriptor)
        assert (tmp_path / "hard").read_bytes() == ANSWER * (number + 1)
    assert (tmp_path / "soft").is_symlink() and (tmp_path / "hard").stat().st_nlink == 2
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["hard", "real", "soft"]


def test_an_interrupted_rewrite_is_repeated_through_any_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "soft").symlink_to("../real")
    (tmp_path / "real").write_bytes(b"x" * 2 * len(ANSWER))
    with (tmp_path / "real").open() as stream:
        kept_path(stream.fileno(), str(tmp_path / "real")).write_bytes(ANSWER)
    out = destination(tmp_path / "far" / "soft")
    assert out.resume() == {"a"} and (tmp_path / "real").read_bytes() == ANSWER
    os.close(out.descriptor)


def test_an_error_of_fsync_is_reported(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Unwritable, match="No space left"):
        destination(tmp_path / "report", "--report").replace(b"{}")


def test_an_output_that_another_run_is_writing_is_refused(tmp_path):
    first, second = destination(tmp_path / "out"), destination(tmp_path / "out")
    first.resume()
    with pytest.raises(UsageError, match="is being written by another run"):
        second.resume()
    os.close(first.descriptor)
    os.close(second.descriptor)
    third = destination(tmp_path / "out")
    assert third.resume() == frozenset()
    os.close(third.descriptor)


def test_a_file_that_is_not_a_batch_output_is_refused_and_not_changed(tmp_path):
    (tmp_path / "out").write_text("precious notes\n")
    out = destination(tmp_path / "out")
    with pytest.raises(UsageError, match=r"-o .*/out exists and is not a batch output"):
        out.resume()
    os.close(out.descriptor)
    assert (tmp_path / "out").read_text() == "precious notes\n"


def test_a_report_replaces_the_contents_and_keeps_the_file(tmp_path):
    (tmp_path / "real").write_text("something longer than the new report")
    (tmp_path / "link").symlink_to("real")
    report = destination(tmp_path / "link", "--report")
    report.replace(b"{}\n")
    os.close(report.descriptor)
    assert (tmp_path / "real").read_text() == "{}\n" and (tmp_path / "link").is_symlink()


def test_a_missing_directory_at_the_end_is_reported(tmp_path):
    with pytest.raises(Unwritable, match="there is no directory"):
        destination(tmp_path / "gone" / "report", "--report").replace(b"{}\n")


def test_two_names_of_one_file_are_refused_and_devices_may_be_shared(tmp_path):
    (tmp_path / "real").touch()
    (tmp_path / "soft").symlink_to("real")
    (tmp_path / "lost").symlink_to("new")
    for one, other in (("real", "real"), ("soft", "real"), ("new", "new"), ("lost", "new")):
        with ExitStack() as created, pytest.raises(UsageError, match="are the same file"):
            paths = [tmp_path / one, tmp_path / other]
            check_different(
                [(str(path), destination(path).check_writable(created)) for path in paths]
            )
    with ExitStack() as created:
        paths = [tmp_path / "real", tmp_path / "new", "/dev/null", "/dev/null"]
        check_different([(str(path), destination(path).check_writable(created)) for path in paths])
    assert sorted(os.listdir(tmp_path)) == ["lost", "real", "soft"]
