"""Stop strings, found in text that arrives piece by piece."""


class StopStrings:
    """Text in, text out up to the first stop string; what could begin one is held back."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to be answer and was not given out yet."""
        if not self._stops:
            return text
        self._held += text
        starts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return self._take(min(starts))
        return self._take(len(self._held) - self._beginning())

    def finish(self) -> str:
        """What was held back, once no more text comes and no stop string was found."""
        return "" if self.found else self._take(len(self._held))

    def _take(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        return given

    def _beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
