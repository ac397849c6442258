"""Finds stop strings in text that arrives in pieces."""


class StopStrings:
    """Passes text on up to the first stop string; holds back text that may begin a stop string."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text. Returns all text that is now known to belong to the answer."""
        if not self._stops:
            return text
        self._held += text
        starts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return self._take(min(starts))
        return self._take(len(self._held) - self._partial_stop_length())

    def finish(self) -> str:
        """End the text. Returns the held text if no stop string was found."""
        return "" if self.found else self._take(len(self._held))

    def _take(self, length: int) -> str:
        passed, self._held = self._held[:length], self._held[length:]
        return passed

    def _partial_stop_length(self) -> int:
        """Return the length of the longest suffix of the held text that begins a stop string."""
        longest = min(len(self._held), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
