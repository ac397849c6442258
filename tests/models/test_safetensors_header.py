"""A header is accepted exactly if the safetensors package opens the file."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mellmpi.models.safetensors_header import LONGEST_HEADER, StoredTensor, read_header

WHOLE = save(
    {"a": np.zeros((2, 3), np.float32), "b": np.zeros((4,), np.float16), "c": np.zeros((0,))},
    metadata={"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(WHOLE[:8], "little")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("header") / "x.safetensors"


def opens(file: Path) -> bool:
    try:
        with safe_open(file, framework="np") as tensors:
            return bool(tensors.keys()) or True
    except (SafetensorError, ValueError):
        return False


def accepted(file: Path) -> bool:
    try:
        read_header(file)
    except ValueError as error:
        assert str(file) in str(error)
        return False
    return True


def with_header(header: str, size: int = 0) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + bytes(size)


def test_names_types_and_shapes_equal_the_saved_ones(file):
    file.write_bytes(WHOLE)
    assert read_header(file) == {
        "a": StoredTensor("F32", (2, 3)),
        "b": StoredTensor("F16", (4,)),
        "c": StoredTensor("F64", (0,)),
    }


def test_every_truncated_file_is_refused(file):
    for size in range(len(WHOLE)):
        file.write_bytes(WHOLE[:size])
        assert not accepted(file)


A = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
B = '"b": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
TWO = "{" + A % (0, 4) + "," + B + "}"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "has 0 bytes, too few"),
        (b"PK\x03\x04" + b"x" * 40, "is not a safetensors file"),
        (struct.pack("<Q", LONGEST_HEADER + 1) + bytes(20), "is not a safetensors file"),
        (struct.pack("<Q", 100) + bytes(20), "is cut short within its header at 28 bytes"),
        (with_header("{nonsense}"), "is not JSON"),
        (with_header("[" * 5000), "is not JSON"),
        (with_header("[1, 2, 3]"), "is not a JSON object"),
        (with_header("{" + A % (0, 4) + "," + A % (4, 8) + "}", 8), "names a tensor twice"),
        (with_header(TWO % (0, 4), 4), "overlap at byte 4"),
        (with_header(TWO % (8, 12), 12), "leave a gap at byte 4"),
        (with_header(TWO % (4, 8), 5), "5 bytes of weights are there, 8 expected"),
        (with_header(TWO % (4, 8), 9), "has 1 bytes behind its last tensor"),
        (with_header("{" + A % (0, 8) + "}", 8), "contradicts itself about 'a'"),
        (with_header("{" + A % (4, 0) + "}", 4), "contradicts itself about 'a'"),
        (with_header(TWO.replace('"F32"', "7", 1) % (4, 8), 8), "holds 'a' in the unknown type 7"),
        (with_header(TWO.replace("[1]", "[-1]", 1) % (4, 8), 8), "no shape or offsets for 'a'"),
        (with_header(TWO.replace("[1]", "1.5", 1) % (4, 8), 8), "no shape or offsets for 'a'"),
        (with_header('{"a": [1, 2]}'), "no shape or offsets for 'a'"),
        (with_header('{"__metadata__": {"a": 1}}'), "has metadata that is not text"),
        (with_header('{"a": null}'), "no shape or offsets for 'a'"),
    ],
)
def test_each_fault_has_its_message(file, data, said):
    file.write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        read_header(file)
    assert str(file) in str(error.value)
    assert not opens(file)


@settings(deadline=None, max_examples=600)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=2))
def test_the_package_opens_accepted_files(tmp_path_factory, changes):
    file = tmp_path_factory.getbasetemp() / "changed.safetensors"
    data = bytearray(WHOLE)
    for position, value in changes:
        data[position] = value
    file.write_bytes(data)
    assert accepted(file) <= opens(file)


@settings(deadline=None, max_examples=200)
@given(st.permutations(range(3)), st.integers(0, 3), st.booleans())
def test_files_that_the_package_opens_are_accepted(tmp_path_factory, order, padding, metadata):
    file = tmp_path_factory.getbasetemp() / "ordered.safetensors"
    header = json.loads(WHOLE[8:HEADER_END])
    names = [name for name in header if name != "__metadata__"]
    entries = {names[i]: header[names[i]] for i in order}
    entries |= {"__metadata__": {"format": "pt"}} if metadata else {}
    text = json.dumps(entries) + " " * padding
    file.write_bytes(with_header(text) + WHOLE[HEADER_END:])
    assert opens(file) and accepted(file)
