"""Answers as a row of blocks, each of one kind of items, and streams of their numbered events.

The API of Responses and the one of Messages have this form. Every item makes the same events
wherever and whenever it is rendered, so that a stream can be continued after any event.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mellmpi.frontend.dialects.sse import event
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.items import Item, Reasoning, Text
from mellmpi.frontend.openai import Call
from mellmpi.frontend.outputs import Output
from mellmpi.frontend.tool_calls import Arguments, CallBegin, CallEnd
from mellmpi.protocol import OpenCall

Json = dict[str, Any]
Events = Iterator[Json]


@dataclass(slots=True)
class Block:
    """Neighbouring items of one kind: reasoning, a text, or one tool call."""

    index: int  # in the answer
    kind: type[Reasoning] | type[Text] | type[CallBegin]
    name: str = ""  # of the tool
    number: int = 0  # of the tool call in the answer
    pieces: list[str] = field(default_factory=list)
    complete: bool = False  # it has ended, and not because the answer broke off

    @property
    def text(self) -> str:
        """The text, or the arguments of the call."""
        return "".join(self.pieces)


class BlockWriter(ABC):
    """Turns the items of one answer into blocks, and into events about them."""

    def __init__(self, call: Call, opened: OpenCall):
        self.call, self.opened = call, opened
        self.blocks: list[Block] = []
        self._open: Block | None = None
        self._num_calls = 0

    def item(self, item: Item) -> Events:
        """Yield the events of the next item."""
        match item:
            case Reasoning(text) | Text(text):
                if self._open is None or self._open.kind is not type(item):
                    yield from self._close(True)
                    yield from self._begin(type(item), "")
                yield from self._grow(text)
            case CallBegin(name):
                yield from self._close(True)
                yield from self._begin(CallBegin, name)
                self._num_calls += 1
            case Arguments(text):
                yield from self._grow(text)
            case CallEnd(complete):
                yield from self._close(complete)

    def end(self, output: Output) -> Events:
        """Yield the events at the end of the answer."""
        yield from self._close(output.finish_reason != "length")
        yield from self.ended(output)

    def write(self, output: Output) -> None:
        """Make the blocks of a whole answer."""
        assert output.log is not None
        for item in output.log.items:
            list(self.item(item))
        list(self.end(output))

    def _begin(self, kind: Any, name: str) -> Events:
        self._open = Block(len(self.blocks), kind, name, self._num_calls)
        self.blocks.append(self._open)
        yield from self.block_begun(self._open)

    def _grow(self, text: str) -> Events:
        assert self._open is not None
        self._open.pieces.append(text)
        yield from self.block_grown(self._open, text)

    def _close(self, complete: bool) -> Events:
        block, self._open = self._open, None
        if block is not None:
            block.complete = complete
            yield from self.block_ended(block)

    # --- of the dialect: each event is an object with a type --------------------------------------

    @abstractmethod
    def begun(self) -> Events:
        """Yield the first events of a stream."""

    @abstractmethod
    def block_begun(self, block: Block) -> Events:
        """Yield the events at the beginning of a block."""

    @abstractmethod
    def block_grown(self, block: Block, text: str) -> Events:
        """Yield the events for more text, or more arguments, of a block."""

    @abstractmethod
    def block_ended(self, block: Block) -> Events:
        """Yield the events at the end of a block."""

    @abstractmethod
    def ended(self, output: Output) -> Events:
        """Yield the last events of a stream."""

    @abstractmethod
    def failed(self, error: BadRequest) -> Events:
        """Yield the last events of a stream that fails."""

    @abstractmethod
    def numbered(self, event: Json, number: int) -> Json:
        """Return an event with its number in the stream, counted from 0."""


@dataclass(slots=True)
class BlockCursor:
    """How far a client has read: the events up to `last` are not sent again."""

    writer: BlockWriter
    last: int  # number of an event; -1: none
    num_events: int = 0
    num_items: int = 0
    ended: bool = False

    def encoded(self, events: Events) -> bytes:
        """Return the events that the client has not read."""
        parts = []
        for data in events:
            number, self.num_events = self.num_events, self.num_events + 1
            if number > self.last:
                data = self.writer.numbered(data, number)
                parts.append(event(data, name=data["type"], id=str(number)))
        return b"".join(parts)

    def new(self, output: Output) -> bytes:
        """Return the events of all that is new, and move to the end."""
        log = output.log
        assert log is not None
        parts = [self.encoded(self.writer.begun())] if not self.num_events else []
        first, self.num_items = self.num_items, len(log.items)
        parts += [self.encoded(self.writer.item(item)) for item in log.items[first:]]
        if output.finish_reason is not None and not self.ended:
            self.ended = True
            parts.append(self.encoded(self.writer.end(output)))
        return b"".join(parts)


class BlockDialect(ABC):
    """The part of a `Dialect` that streams events. Its calls have one choice; positions are numbers
    of events."""

    def __init__(self, call: Call, opened: OpenCall):
        self._call, self._opened = call, opened

    @abstractmethod
    def writer(self) -> BlockWriter:
        """Return a new writer."""

    def start(self, positions: Sequence[int], outputs: Sequence[Output]) -> list[BlockCursor]:
        """Return the cursor of a client that has read so far."""
        return [BlockCursor(self.writer(), positions[0])]

    def new(self, cursors: list[BlockCursor], outputs: Sequence[Output]) -> bytes:
        """Return the events of all that is new since the cursor, and move it to the end."""
        return cursors[0].new(outputs[0])

    def end(self, outputs: Sequence[Output]) -> bytes:
        """Return nothing: the last event of the answer is the last of the stream."""
        return b""

    def error(self, cursors: list[BlockCursor], error: BadRequest) -> bytes:
        """Return the last events of an answer that fails."""
        return cursors[0].encoded(cursors[0].writer.failed(error))
