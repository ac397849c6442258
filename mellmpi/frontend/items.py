"""The parts of an answer, its items: reasoning, text and tool calls, found in text as it arrives.

Items are only ever added: what has been found stays, whatever comes after it. A call that cannot
be read is text; a call that breaks off in its arguments ends there, and what follows is text.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mellmpi.frontend.tool_calls import Arguments, CallBegin, CallEnd, CallReader

SEPARATORS = " \t\r\n,;[]"  # between calls


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model writes before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer's text."""

    text: str


Item = Reasoning | Text | CallBegin | Arguments | CallEnd


@dataclass(frozen=True, slots=True, kw_only=True)
class Markup:
    """What marks the items of an answer. Without anything, all is text."""

    reasoning: tuple[str, str] | None = None  # what is before reasoning, and what after it
    in_reasoning: bool = False  # the prompt ends with what is before reasoning
    calls: bool = False  # whether there may be tool calls
    before_calls: str = ""
    after_calls: str = ""
    bare: bool = False  # calls may begin the answer without `before_calls`
    names: frozenset[str] | None = None  # of the tools; None: any name makes a call
    parallel: bool = True  # False: the answer ends with its first call
    short_ids: bool = False  # ids of calls have nine letters and digits

    @property
    def texts(self) -> tuple[str, ...]:
        """All marks. Those that are special tokens must be in the text."""
        marks = (*(self.reasoning or ()), self.before_calls, self.after_calls)
        return tuple(mark for mark in marks if mark)


PLAIN = Markup()


class ItemParser:
    """Turns text into items. Their joined texts do not depend on how the text is cut."""

    def __init__(self, markup: Markup):
        self._markup = markup
        self._held = ""  # text that is not understood yet
        self._pending = ""  # text of calls that have not begun: it becomes text if they do not
        self._called = False  # whether the block of calls has a call
        self._call: CallReader | None = None
        self._items: list[Item] = []
        self._after_gap: Callable[[], bool] = self._answer
        self._read: Callable[[], bool] = self._answer
        if markup.in_reasoning:
            self._skip_space(self._reasoning)
        elif markup.reasoning:
            self._read = self._start
        self.ended = False  # no text after this changes anything

    def push(self, text: str) -> list[Item]:
        """Add text. Returns the new items."""
        self._held += text
        while not self.ended and self._read():
            pass
        return self._taken()

    def finish(self) -> list[Item]:
        """End the text. Returns the last items."""
        if self._call is not None and self._call.begun:
            self._items.append(CallEnd(False))
        elif not self.ended and self._read != self._gap:
            rest = self._pending + self._held
            if self._called:
                rest = rest.lstrip(SEPARATORS)
            self._add(Reasoning if self._read == self._reasoning else Text, rest)
        self._held = self._pending = ""
        return self._taken()

    def _taken(self) -> list[Item]:
        items, self._items = self._items, []
        return items

    def _add(self, kind: type[Reasoning] | type[Text], text: str) -> None:
        if text:
            self._items.append(kind(text))

    # --- states: each returns whether another one goes on with the held text ----------------------

    def _start(self) -> bool:
        """Before the answer, which may begin with reasoning."""
        assert self._markup.reasoning is not None
        before, text = self._markup.reasoning[0], self._held.lstrip()
        if len(text) < len(before) and before.startswith(text):
            return False
        if not text.startswith(before):
            self._read = self._answer
            return True
        self._held = text[len(before) :]
        return self._skip_space(self._reasoning)

    def _reasoning(self) -> bool:
        assert self._markup.reasoning is not None
        after = self._markup.reasoning[1]
        if not self._pass(Reasoning, after):
            return False
        self._held = self._held.lstrip()[len(after) :]
        return self._skip_space(self._answer)

    def _skip_space(self, then: Callable[[], bool]) -> bool:
        self._after_gap, self._read = then, self._gap
        return True

    def _gap(self) -> bool:
        """White space between items belongs to none of them."""
        self._held = self._held.lstrip()
        if self._held:
            self._read = self._after_gap
        return bool(self._held)

    def _answer(self) -> bool:
        """At the beginning of the answer, where bare calls may be."""
        text = self._held.lstrip()
        if self._markup.bare and not text:
            return False
        bare = self._markup.bare and text[0] in "{["
        self._read = self._calls if bare else self._text
        return True

    def _text(self) -> bool:
        before = self._markup.before_calls
        if not before or not self._markup.calls:
            self._add(Text, self._held)
            self._held = ""
            return False
        if not self._pass(Text, before):
            return False
        end = self._held.index(before) + len(before)
        self._pending, self._held = self._held[:end], self._held[end:]
        self._called = False
        self._read = self._calls
        return True

    def _pass(self, kind: type[Reasoning] | type[Text], mark: str) -> bool:
        """Add text up to a mark and the white space before it. Returns whether it is there."""
        at = self._held.find(mark)
        end = at if at >= 0 else len(self._held) - _begun(self._held, mark)
        end = len(self._held[:end].rstrip())
        self._add(kind, self._held[:end])
        self._held = self._held[end:]
        return at >= 0

    def _calls(self) -> bool:
        """Between calls."""
        after = self._markup.after_calls
        rest = self._held.lstrip(SEPARATORS)
        self._pending += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if rest.startswith("{"):
            self._call = CallReader(self._markup.names)
            self._read = self._in_call
            return True
        if after and self._called and rest.startswith(after):
            self._held, self._pending = rest[len(after) :], ""
            return self._skip_space(self._text)
        if not rest or (after and self._called and after.startswith(rest)):
            return False
        return self._give_up()

    def _in_call(self) -> bool:
        call = self._call
        assert call is not None
        taken, items = call.push(self._held)
        self._items += items
        self._pending = "" if call.begun else self._pending + self._held[:taken]
        self._held = self._held[taken:]
        self._called = self._called or call.begun
        if call.ended:
            self._call, self._read = None, self._calls
            self.ended = not self._markup.parallel
            return True
        if self._held and call.begun:
            self._items.append(CallEnd(False))
        return self._give_up() if self._held else False

    def _give_up(self) -> bool:
        """What comes is no call."""
        pending = self._pending.lstrip(SEPARATORS) if self._called else self._pending
        self._add(Text, pending)
        self._pending, self._call, self._read = "", None, self._text
        return True


def _begun(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that begins `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)


class ItemLog:
    """The items of one answer, and how many of them each of its tokens has completed."""

    def __init__(self, markup: Markup):
        self._parser = ItemParser(markup)
        self.items: list[Item] = []
        self.passed: list[int] = []  # number of items after each token

    def push(self, text: str) -> bool:
        """Add the text of one token. Returns whether the answer ends with it."""
        self.items += self._parser.push(text)
        self.passed.append(len(self.items))
        return self._parser.ended

    def finish(self, text: str) -> None:
        """End the answer, after text that no token has completed."""
        self.items += self._parser.push(text)
        self.items += self._parser.finish()

    @property
    def has_calls(self) -> bool:
        """Whether the answer calls a tool."""
        return any(isinstance(item, CallBegin) for item in self.items)

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of tokens up to the end of the reasoning."""
        places = (n for n, item in enumerate(self.items, 1) if isinstance(item, Reasoning))
        last = max(places, default=0)
        return sum(1 for passed in self.passed if passed <= last) if last else 0


def merged(items: Iterable[Item]) -> list[Item]:
    """Join neighbouring pieces of the same kind."""
    joined: list[Item] = []
    for item in items:
        last = joined[-1] if joined else None
        if isinstance(item, Reasoning | Text | Arguments) and type(last) is type(item):
            assert isinstance(last, Reasoning | Text | Arguments)
            joined[-1] = replace(last, text=last.text + item.text)
        else:
            joined.append(item)
    return joined
