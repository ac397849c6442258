"""Inputs are opened without blocking, and regular files are checked from end to end."""

import gzip
import os
import socket

import pytest

from mellmpi.config import UsageError
from mellmpi.files import (
    Source,
    check_input,
    descriptor_reader,
    is_descriptor,
    open_input,
    requests_in,
)

LINES = b'{"a": 1}\r\n\n{"b": 2}\n  \n{"c": 3}'


def opened(path):
    source = Source(str(path))
    descriptor = open_input(str(path), source)
    return requests_in(descriptor, descriptor_reader(descriptor), source)


def read_all(requests):
    found = []
    while not requests.lines.exhausted:
        if (line := requests.lines.next()) is not None and not line.is_blank:
            found.append(line.data.strip())
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_a_regular_file_is_counted_and_then_read_from_its_beginning(tmp_path, packed):
    (tmp_path / "in").write_bytes(gzip.compress(LINES) if packed else LINES)
    requests = opened(tmp_path / "in")
    assert requests.count == 3
    assert read_all(requests) == [b'{"a": 1}', b'{"b": 2}', b'{"c": 3}']
    assert not requests.lines.problem


def test_an_open_file_is_read_from_its_current_position(tmp_path):
    (tmp_path / "in").write_bytes(LINES)
    descriptor = os.open(tmp_path / "in", os.O_RDONLY)
    os.read(descriptor, LINES.index(b"{", 1))
    requests = requests_in(descriptor, descriptor_reader(descriptor), Source(None))
    assert requests.count == 2 and read_all(requests) == [b'{"b": 2}', b'{"c": 3}']


def test_a_named_pipe_is_opened_without_a_writer_and_ends_with_its_writer(tmp_path):
    os.mkfifo(tmp_path / "in")
    requests = opened(tmp_path / "in")
    assert requests.count is None
    assert requests.lines.next() is None and not requests.lines.exhausted
    writer = os.open(tmp_path / "in", os.O_WRONLY)
    assert requests.lines.next() is None and not requests.lines.exhausted
    os.write(writer, LINES)
    assert requests.lines.next().data == b'{"a": 1}\r'
    os.close(writer)
    assert read_all(requests) == [b'{"b": 2}', b'{"c": 3}']


def test_dev_null_is_an_empty_input():
    requests = opened("/dev/null")
    assert requests.count is None and read_all(requests) == [] and not requests.lines.problem


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("none", "there is no such file"),
        (".", "is a directory"),
        ("socket", "is a socket"),
        ("/dev/zero", "is a device"),
        ("loop", "Too many levels"),
        ("x" * 300, "too long"),
        ("in/in", "Not a directory"),
    ],
)
def test_an_unreadable_input_is_refused_with_what_to_type(tmp_path, name, what):
    (tmp_path / "in").write_bytes(LINES)
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        with pytest.raises(UsageError, match=what) as refused:
            opened(tmp_path / name)
    assert "cat FILE | … -i -" in str(refused.value)


def test_a_damaged_regular_file_is_refused_before_any_answer(tmp_path):
    (tmp_path / "in").write_bytes(gzip.compress(LINES)[:-4])
    with pytest.raises(UsageError, match="ends in the middle of its gzip data"):
        opened(tmp_path / "in")


def test_a_file_that_becomes_shorter_while_it_is_read_is_detected(tmp_path):
    (tmp_path / "in").write_bytes(LINES)
    requests = opened(tmp_path / "in")
    os.truncate(tmp_path / "in", LINES.index(b"{", 1) + 3)
    assert read_all(requests) == [b'{"a": 1}']
    assert requests.lines.problem == f"-i {tmp_path}/in became shorter while it was read"


def test_a_file_that_grows_or_is_removed_while_it_is_read_is_read_to_its_end(tmp_path):
    (tmp_path / "in").write_bytes(LINES)
    requests = opened(tmp_path / "in")
    with (tmp_path / "in").open("ab") as stream:
        stream.write(b'\n{"d": 4}\n')
    (tmp_path / "in").unlink()
    assert len(read_all(requests)) == 4 and not requests.lines.problem


def test_other_names_of_an_open_pipe_are_recognised():
    source, sink = os.pipe()
    assert is_descriptor(f"/dev/fd/{source}", source) and is_descriptor(
        f"/proc/self/fd/{sink}", sink
    )
    assert not is_descriptor("/dev/null", source) and not is_descriptor("/no/such", source)
    os.close(source)
    assert not is_descriptor(f"/dev/fd/{sink}", source)
    os.close(sink)


def test_standard_input_may_be_a_socket_but_not_a_directory(tmp_path):
    one, other = socket.socketpair()
    check_input(one.fileno(), Source(None))
    one.close()
    other.close()
    directory = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(UsageError, match="standard input is a directory"):
        check_input(directory, Source(None))
    os.close(directory)


def test_a_regular_file_is_not_another_name_of_its_descriptor(tmp_path):
    (tmp_path / "in").write_bytes(LINES)
    with (tmp_path / "in").open() as stream:
        assert not is_descriptor(str(tmp_path / "in"), stream.fileno())
