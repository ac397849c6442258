"""What every dialect does, and which URL speaks which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.openai import Call
from mellmpi.frontend.outputs import Output
from mellmpi.frontend.served import ServedModels
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.protocol import OpenCall

NEW = -1  # a position before the first event


@dataclass(frozen=True)
class FieldNames:
    """Names of the fields of a body."""

    known: tuple[str, ...]
    ignored: tuple[str, ...]
    unsupported: Mapping[str, tuple[Any, ...]]  # with the values that are accepted, beside null


class Cursor(Protocol):
    """How far a client has read one choice."""

    ended: bool


class Dialect(Protocol):
    """Renders the answer to one call. Keeps no text: a client may read from any position on.

    A position is a number in the id of an event, one for each choice; NEW: nothing has been read.
    """

    def __init__(self, call: Call, tokenizer: Tokenizer, opened: OpenCall): ...

    @staticmethod
    def parse(url: str, body: dict[str, Any], served: ServedModels, identity: str) -> Call:
        """Check a body. Raises BadRequest. Arguments as of `openai.parse`."""

    @staticmethod
    def error_body(error: BadRequest) -> dict[str, Any]:
        """Return the body of a response with an error."""

    def body(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """Return the whole answer, once all outputs are finished."""

    def start(self, positions: Sequence[int], outputs: Sequence[Output]) -> list[Any]:
        """Return cursors for a client that has read so far."""

    def new(self, cursors: list[Any], outputs: Sequence[Output]) -> bytes:
        """Return the events of all that is new since the cursors, and move these to the end."""

    def end(self, outputs: Sequence[Output]) -> bytes:
        """Return the last events, after those of all choices."""

    def error(self, cursors: list[Any], error: BadRequest) -> bytes:
        """Return the last events of an answer that fails."""
