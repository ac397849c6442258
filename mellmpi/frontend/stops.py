"""Finds stop strings in text that arrives in pieces."""

import re
from collections import defaultdict
from functools import lru_cache

Beginnings = dict[str, list[tuple[int, str]]]  # last character -> (length, stop string)


class StopStrings:
    """Passes text on up to the first stop string; holds back text that may begin a stop string."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._whole, self._begun = _searches(stops)
        self._held = ""
        self.found = False
        self.text: str | None = None  # the stop string that was found

    def push(self, text: str) -> str:
        """Add text. Returns all text that is now known to belong to the answer."""
        if not self._stops:
            return text
        self._held += text
        if (match := self._whole.search(self._held)) is not None:
            self.found = True
            self.text = match[0]
            return self._take(match.start())
        return self._take(len(self._held) - self._partial_stop_length())

    def finish(self) -> str:
        """End the text. Returns the held text if no stop string was found."""
        return "" if self.found else self._take(len(self._held))

    def _take(self, length: int) -> str:
        passed, self._held = self._held[:length], self._held[length:]
        return passed

    def _partial_stop_length(self) -> int:
        """Return the length of the longest suffix of the held text that begins a stop string."""
        for length, stop in self._begun.get(self._held[-1:], ()):
            if self._held.endswith(stop[:length]):
                return length
        return 0


@lru_cache(maxsize=256)
def _searches(stops: tuple[str, ...]) -> tuple[re.Pattern[str], Beginnings]:
    """Return a pattern of the stop strings, and their beginnings by last character, longest first.

    Most text ends in a character that ends no beginning, and is passed on after one look.
    """
    begun: Beginnings = defaultdict(list)
    lengths = [(length, stop) for stop in stops for length in range(1, len(stop))]
    for length, stop in sorted(lengths, reverse=True):
        begun[stop[length - 1]].append((length, stop))
    return re.compile("|".join(map(re.escape, stops))), dict(begun)
