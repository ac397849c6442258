"""Checks of a safetensors header against the size of its file, without reading weights.

The format: 8 bytes of header length, little-endian, a JSON header, the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). The safetensors package opens all accepted files.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from mellmpi.models.model_files import refuse_pointer, short

LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors package
BYTES = {  # of one element
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
AGAIN = "copy or download it again"


class StoredTensor(NamedTuple):
    """Type and shape of a tensor in a safetensors file."""

    dtype: str  # a key of `BYTES`
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """All tensors of `file` by name; ValueError names the file and its fault."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(200)
        refuse_pointer(start, file)
        if size < 10:
            raise ValueError(f"{file} has {size} bytes, too few for safetensors: {AGAIN}")
        length = int.from_bytes(start[:8], "little")
        if length > LONGEST_HEADER:
            raise ValueError(f"{file} is not a safetensors file: {AGAIN}")
        if 8 + length > size:
            raise ValueError(f"{file} is cut short within its header at {size} bytes: {AGAIN}")
        stream.seek(8)
        tensors = _parse(stream.read(length), file)
    _check_extent(tensors, file, size - 8 - length)
    return {name: StoredTensor(tensor["dtype"], tuple(tensor["shape"])) for name, tensor in tensors}


def _parse(header: bytes, file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name, entry) pairs of the header; every entry is valid by itself."""
    try:
        # Pairs, because a dictionary would hide a name that occurs twice.
        pairs = json.loads(header.decode("utf-8"), object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header of {file} is not JSON: {AGAIN}") from error
    if not header.startswith(b"{"):
        raise ValueError(f"the header of {file} is not a JSON object: {AGAIN}")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"the header of {file} names a tensor twice: {AGAIN}")
    metadata = dict(pairs).get("__metadata__", [])
    if not _are_pairs(metadata) or not all(isinstance(text, str) for _, text in metadata):
        raise ValueError(f"the header of {file} has metadata that is not text: {AGAIN}")
    return [(name, _entry(name, entry, file)) for name, entry in pairs if name != "__metadata__"]


def _entry(name: str, pairs: Any, file: Path) -> dict[str, Any]:
    entry = dict(pairs) if _are_pairs(pairs) else {}
    shape, offsets, dtype = (entry.get(key) for key in ("shape", "data_offsets", "dtype"))
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"the header of {file} has no shape or offsets for {short(name)}: {AGAIN}")
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ValueError(
            f"{file} holds {short(name)} in the unknown type {short(dtype)}: {AGAIN}, or take "
            "float32, bfloat16 or float16 weights"
        )
    if offsets[1] - offsets[0] != math.prod(shape) * BYTES[dtype]:
        raise ValueError(f"the header of {file} contradicts itself about {short(name)}: {AGAIN}")
    return entry


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, tuple) for item in value)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_extent(tensors: list[tuple[str, dict[str, Any]]], file: Path, present: int) -> None:
    """ValueError unless the tensors fill the `present` bytes after the header without gaps."""
    end = 0
    for offsets in sorted(entry["data_offsets"] for _, entry in tensors):
        if offsets[0] != end:
            kind = "overlap" if offsets[0] < end else "leave a gap"
            raise ValueError(f"tensors of {file} {kind} at byte {end}: {AGAIN}")
        end = offsets[1]
    if end > present:
        raise ValueError(
            f"{file} is cut short: {present} bytes of weights are there, {end} expected: {AGAIN}"
        )
    if end < present:
        raise ValueError(f"{file} has {present - end} bytes behind its last tensor: {AGAIN}")
