"""Reader of GGUF files: checks every offset against the file's size, and maps tensors in place.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from mellmpi.models.config_values import size
from mellmpi.models.model_files import refuse_pointer, short

VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
NUMBERS = {
    0: "B",
    1: "b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
MOST_DIMENSIONS = 4
OTHER_KINDS = "take a file of another type, such as Q8_0, Q4_K_M or F16"


class GgufTensor(NamedTuple):
    """One tensor, its data mapped from the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # rows first, as in Hugging Face files
    data: np.ndarray  # uint8 [..., bytes of a row]


class GgufFile(NamedTuple):
    """The content of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(file: Path) -> GgufFile:
    """Read metadata and map tensors; ValueError says what is wrong, without the file's name."""
    if file.stat().st_size < 24:
        raise ValueError("has too few bytes for GGUF: copy or download it again")
    data = np.memmap(file, mode="r", dtype=np.uint8)
    _check_version(data[:200].tobytes(), file)
    cursor = _Cursor(data, 8)
    num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"has the key {short(key)} twice: copy or download it again")
        metadata[key] = cursor.value(cursor.number("<I"))
    infos = [cursor.tensor_info() for _ in range(num_tensors)]
    alignment = size(metadata, "general.alignment", default=32)
    start = cursor.offset + -cursor.offset % alignment
    return GgufFile(metadata, _map(infos, data, start))


def _check_version(head: bytes, file: Path) -> None:
    refuse_pointer(head, file)
    if not head.startswith(b"GGUF"):
        raise ValueError("is no GGUF file: copy or download it again")
    (version,) = struct.unpack_from("<I", head, 4)
    if version & 0xFFFF == 0:
        raise ValueError(
            "is a big-endian GGUF file: convert it with gguf_convert_endian.py of llama.cpp"
        )
    if version not in VERSIONS:
        raise ValueError(
            f"is a GGUF file of version {version}; supported are {', '.join(map(str, VERSIONS))}: "
            "make it again with a current llama.cpp"
        )


class _Cursor:
    """Reads values one after the other; ValueError beyond the end of the data."""

    def __init__(self, data: np.ndarray, offset: int):
        self._data, self.offset = data, offset

    def take(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self._data):
            raise ValueError(
                f"is damaged or cut short at {len(self._data)} bytes: copy or download it again"
            )
        start, self.offset = self.offset, end
        return self._data[start:end].tobytes()

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        data = self.take(self.number("<Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("has text that is not UTF-8: copy or download it again") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array()
        return self.number(self._form(kind))

    def _array(self) -> list[Any]:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == STRING:
            return [self.text() for _ in range(count)]
        form = self._form(kind)
        return list(np.frombuffer(self.take(count * struct.calcsize(form)), form).tolist())

    def _form(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise ValueError(f"has a value of unknown type {kind}: copy or download it again")
        return NUMBERS[kind]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, offset) of the next tensor."""
        name, num_dimensions = self.text(), self.number("<I")
        if not 1 <= num_dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"has a tensor {short(name)} of {num_dimensions} dimensions")
        dimensions = struct.unpack(f"<{num_dimensions}Q", self.take(8 * num_dimensions))
        return name, dimensions[::-1], self.number("<I"), self.number("<Q")


def _map(
    infos: list[tuple[str, tuple[int, ...], int, int]], data: np.ndarray, start: int
) -> dict[str, GgufTensor]:
    """The tensors by name; `start` is the offset of the tensor data in the file."""
    tensors, needed = {}, 0
    for name, shape, number, offset in infos:
        kind = _known_kind(number, name)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if name in tensors or 0 in shape or shape[-1] % block:
            raise ValueError(f"has a wrong tensor {short(name)}: copy or download it again")
        stored = (*shape[:-1], shape[-1] // block * block_bytes)
        first = start + offset
        last = first + math.prod(stored)
        needed = max(needed, last)
        if last <= len(data):  # else refused below, with the number of bytes expected
            tensors[name] = GgufTensor(kind, shape, data[first:last].reshape(stored))
    if needed > len(data):
        raise ValueError(
            f"is cut short: {len(data)} bytes are there, {needed} expected: copy or download it "
            "again"
        )
    return tensors


def _known_kind(number: int, name: str) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(number)
    except ValueError as error:
        raise ValueError(
            f"holds {short(name)} in the unknown type {number}: {OTHER_KINDS}"
        ) from error
