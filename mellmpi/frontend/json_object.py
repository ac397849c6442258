"""Reads one JSON object (RFC 8259) that arrives character by character."""

import math
import re
from enum import Enum
from typing import Final

MAX_DEPTH = 100  # of nesting: readers in other languages refuse more
MAX_WORD = 512  # characters of a number
SPACE: Final = frozenset(" \t\r\n")
WORD: Final = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-.")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
ESCAPED: Final = frozenset('"\\/bfnrt')
HEX: Final = frozenset("0123456789abcdefABCDEF")


class Broken(Exception):
    """The text is not a JSON object."""


class Part(Enum):
    """What a character belongs to, seen from the object itself."""

    KEY = "key"  # of a member, with its quotes
    VALUE = "value"  # of a member
    BETWEEN = "between"


class Expects(Enum):
    """What may come next, beside white space."""

    OBJECT = "{"
    KEY_OR_END = "a key or }"
    KEY = "a key"
    COLON = ":"
    VALUE_OR_END = "a value or ]"
    VALUE = "a value"
    COMMA_OR_END = ", or the end"
    NOTHING = "nothing"


class JsonObject:
    """Checks characters one by one, and says which part each of them belongs to."""

    def __init__(self) -> None:
        self._expects = Expects.OBJECT
        self._open = ""  # brackets that are open
        self._word = ""  # number or literal so far
        self._string: Part | None = None  # what the string that is open is
        self._escape = ""  # escape sequence so far

    @property
    def ended(self) -> bool:
        """Whether the object is complete."""
        return self._expects is Expects.NOTHING

    def push(self, char: str) -> Part:
        """Add a character. Raises Broken if no object can go on with it."""
        outer = len(self._open) <= 1
        if self._string is not None:
            part = self._string
            self._in_string(char)
        elif char in WORD:
            part = Part.VALUE
            self._in_word(char)
        else:
            if self._word:
                self._end_word()
            part = Part.BETWEEN if char in SPACE else self._structure(char)
        return part if outer else Part.VALUE

    def _in_string(self, char: str) -> None:
        if self._escape:
            self._escape += char
            if self._escape[1] == "u":
                if len(self._escape) > 2 and char not in HEX:
                    raise Broken
                if len(self._escape) < 6:
                    return
            elif char not in ESCAPED:
                raise Broken
            self._escape = ""
        elif char == "\\":
            self._escape = char
        elif char == '"':
            key = self._string is Part.KEY
            self._string = None
            self._expects = Expects.COLON if key else Expects.COMMA_OR_END
        elif char < " ":
            raise Broken

    def _in_word(self, char: str) -> None:
        if not self._word and self._expects not in (Expects.VALUE, Expects.VALUE_OR_END):
            raise Broken
        self._word += char
        if len(self._word) > MAX_WORD:
            raise Broken

    def _end_word(self) -> None:
        word, self._word = self._word, ""
        is_number = NUMBER.fullmatch(word) and math.isfinite(float(word))
        if not is_number and word not in ("true", "false", "null"):
            raise Broken
        self._expects = Expects.COMMA_OR_END

    def _structure(self, char: str) -> Part:
        expects = self._expects
        match char:
            case "{" if expects in (Expects.OBJECT, Expects.VALUE, Expects.VALUE_OR_END):
                self._nest(char, Expects.KEY_OR_END)
                return Part.BETWEEN if expects is Expects.OBJECT else Part.VALUE
            case "[" if expects in (Expects.VALUE, Expects.VALUE_OR_END):
                self._nest(char, Expects.VALUE_OR_END)
                return Part.VALUE
            case '"' if expects in (Expects.KEY, Expects.KEY_OR_END):
                self._string = Part.KEY
                return Part.KEY
            case '"' if expects in (Expects.VALUE, Expects.VALUE_OR_END):
                self._string = Part.VALUE
                return Part.VALUE
            case ":" if expects is Expects.COLON:
                self._expects = Expects.VALUE
            case "," if expects is Expects.COMMA_OR_END:
                self._expects = Expects.KEY if self._open[-1] == "{" else Expects.VALUE
            case "}" if expects in (Expects.COMMA_OR_END, Expects.KEY_OR_END):
                self._unnest("{")
            case "]" if expects in (Expects.COMMA_OR_END, Expects.VALUE_OR_END):
                self._unnest("[")
            case _:
                raise Broken
        return Part.BETWEEN

    def _nest(self, bracket: str, expects: Expects) -> None:
        if len(self._open) == MAX_DEPTH:
            raise Broken
        self._open += bracket
        self._expects = expects

    def _unnest(self, bracket: str) -> None:
        if self._open[-1:] != bracket:
            raise Broken
        self._open = self._open[:-1]
        self._expects = Expects.COMMA_OR_END if self._open else Expects.NOTHING
