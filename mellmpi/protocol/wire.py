"""The wire form of messages: `[tag, *fields]` in msgpack; and who they are addressed to."""

from dataclasses import dataclass
from typing import Any, Final, TypeVar, dataclass_transform

import msgpack

T = TypeVar("T")

SCHEDULER: Final = 0  # the address of rank 0's scheduler; workers are 1, 2, 3 …
FRONT: Final = "front"  # whoever submitted the request
ROUNDS: Final = 64  # of one migration, at most; the i-th has the tag ROUNDS * dst_epoch + i
OBSERVER: Final = "observer"  # metrics and timeline: told what happened, never asked
DATA_PLANE: Final = "data plane"  # the worker's own block mover, beside its batch scheduler
Address = int | str

TYPES: dict[str, type] = {}


@dataclass_transform(frozen_default=True)
def message(cls: type[T]) -> type[T]:
    """A frozen, slotted dataclass that crosses rank boundaries as [tag, *fields]."""
    cls = dataclass(frozen=True, slots=True)(cls)
    cls.__init__ = _initializer(cls)  # type: ignore[method-assign]
    TYPES[cls.__name__] = cls
    return cls


def _initializer(cls: Any) -> Any:
    """`__init__` that fills the slots themselves.

    That of a frozen dataclass finds each of them by its name, and takes three times as long.
    """
    names = cls.__slots__
    scope = {f"fill_{name}": getattr(cls, name).__set__ for name in names}
    fills = [f"fill_{name}(self, {name})" for name in names]
    exec(f"def __init__({', '.join(['self', *names])}): {'; '.join(fills) or 'pass'}", scope)
    return scope["__init__"]


def _plain(value: Any) -> list[Any]:
    return [type(value).__name__, *(getattr(value, name) for name in value.__slots__)]


def encode(m: Any) -> bytes:
    """The wire form of a message; nested messages become nested [tag, *fields] lists."""
    data: bytes = msgpack.packb(_plain(m), default=lambda v: {"": _plain(v)})
    return data


def _nested(value: dict[str, Any]) -> Any:
    tag, *rest = value[""]
    return TYPES[tag](*rest)


def decode(data: bytes) -> Any:
    """The message that `encode` wrote. Sequences come back as tuples."""
    tag, *rest = msgpack.unpackb(data, use_list=False, object_hook=_nested)
    return TYPES[tag](*rest)
