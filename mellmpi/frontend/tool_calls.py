"""Reads one tool call, a JSON object with a name and arguments, as it arrives."""

import json
from dataclasses import dataclass

from mellmpi.frontend.json_object import Broken, JsonObject, Part

ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the arguments of a tool call, which are a JSON object."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A tool call ends."""

    complete: bool  # False: the answer broke off, or went on with what is no JSON


CallItem = CallBegin | Arguments | CallEnd


class CallReader:
    """Turns the characters of one call into items. Nothing can be undone after `CallBegin`."""

    def __init__(self, names: frozenset[str] | None):
        """`names`: the tools that there are; None: any name makes a call, even without arguments"""
        self._names, self._json = names, JsonObject()
        self._key, self._value = "", ""
        self._name: str | None = None
        self._early: str | None = None  # arguments that came before the name
        self._new: list[str] = []  # characters of the arguments
        self.begun, self.ended = False, False

    def push(self, text: str) -> tuple[int, list[CallItem]]:
        """Add text; return how much of it belongs to the call, and the new items.

        Less than all of it belongs to the call if the call has `ended`, or is broken.
        """
        items: list[CallItem] = []
        taken = 0
        try:
            for char in text:
                self._push(char, items)
                taken += 1
                if self._json.ended:
                    self.ended = True
                    break
        except Broken:
            pass
        self._flush(items)
        if self.ended:
            items.append(CallEnd(True))
        return taken, items

    def _push(self, char: str, items: list[CallItem]) -> None:
        part = self._json.push(char)
        if part is Part.KEY:
            self._key += char
        elif part is Part.VALUE:
            self._in_value(char, items)
        elif char in ",}":
            self._end_value(items)
            if self._json.ended and not self.begun:
                self._end_without_arguments(items)

    def _in_value(self, char: str, items: list[CallItem]) -> None:
        key = self._key[1:-1]
        if key in ARGUMENTS:
            if not self._value:
                if char != "{" or self.begun or self._early is not None:
                    raise Broken
                if self._name is not None:
                    self._begin(items)
                self._value = char
                self._new = [char]
            else:
                self._new.append(char)
        elif key == "name":
            self._value += char

    def _end_value(self, items: list[CallItem]) -> None:
        key, value = self._key[1:-1], self._value
        self._key = self._value = ""
        if key in ARGUMENTS and not self.begun:
            self._early, self._new = "".join(self._new), []
        elif key == "name":
            name = json.loads(value)
            if not isinstance(name, str) or not name or self._name is not None:
                raise Broken
            if self._names is not None and name not in self._names:
                raise Broken
            self._name = name
            if self._early is not None:
                self._begin(items)
                self._new = [self._early]
                self._flush(items)

    def _begin(self, items: list[CallItem]) -> None:
        assert self._name is not None
        self.begun = True
        items.append(CallBegin(self._name))

    def _flush(self, items: list[CallItem]) -> None:
        if self.begun and self._new:
            items.append(Arguments("".join(self._new)))
            self._new = []

    def _end_without_arguments(self, items: list[CallItem]) -> None:
        if self._name is None or self._names is not None:
            raise Broken
        self._begin(items)
        self._new = ["{}"]
