"""What moves take beyond their bytes and their computing, fitted from the moves themselves.

took_s = waits · wait_s + stretch · work_s, by least squares. `wait_s` is what messages and the step
boundaries at which they are taken in should take; a processor that receives and computes at once
stretches the work. Errors count relative to what it took: short moves say how much is waited, long
ones what is stretched.
"""

FORGET = 0.85  # weight of the past, a move
INERTIA = (0.1, 0.2)  # moves that the prior, 1 and 1, counts as
OUTLIER = 3.0  # times more or less than predicted: a long prefill was in the way, or a prefix there


class MigrationOverhead:
    """Moves of one kind. With no moves yet, what `like` says; or waits and work as expected."""

    def __init__(self, like: "MigrationOverhead | None" = None):
        self._like = like
        self._sums = [0.0] * 5  # wait², wait · work, work², and wait, work · took
        self._fit, self._fit_of = (0.0, 0.0), (0.0, 0.0)  # and the prior that it is of
        self._fresh = False  # since `age`

    def _found(self) -> tuple[float, float]:
        """Factors of the wait and of the work."""
        prior = (1.0, 1.0) if self._like is None else self._like._found()
        if prior != self._fit_of:
            self._fit, self._fit_of = self._fitted(*prior), prior
        return self._fit

    def _fitted(self, waits: float, stretch: float) -> tuple[float, float]:
        """Least squares, in closed form since every plan asks; nothing is below zero."""
        aa, ab, bb, at, bt = self._sums
        weights = INERTIA[0] / max(waits, 1e-3) ** 2, INERTIA[1] / max(stretch, 1e-3) ** 2
        aa, at = aa + weights[0], at + weights[0] * waits
        bb, bt = bb + weights[1], bt + weights[1] * stretch
        volume = aa * bb - ab * ab
        found = (at * bb - bt * ab) / volume, (aa * bt - ab * at) / volume
        if min(found) >= 0:
            return found
        return (0.0, bt / bb) if found[0] < found[1] else (at / aa, 0.0)

    def took_s(self, wait_s: float, work_s: float) -> float:
        """What a move with so much waiting and work is expected to take."""
        waits, stretch = self._found()
        return waits * wait_s + stretch * work_s

    def add(self, wait_s: float, work_s: float, took_s: float) -> None:
        """A move is over."""
        expected_s = max(self.took_s(wait_s, work_s), 1e-6)
        took_s = min(max(took_s, expected_s / OUTLIER), expected_s * OUTLIER)
        # Relative to between the two: to what was expected, a slow one would count too much, and
        # to what it took, a change for the worse too little.
        size2 = expected_s * took_s
        seen = wait_s * wait_s, wait_s * work_s, work_s * work_s, wait_s * took_s, work_s * took_s
        self._now([FORGET * s + v / size2 for s, v in zip(self._sums, seen, strict=True)])
        self._fresh = True

    def age(self) -> None:
        """Time has passed: where no move was seen in it, half is as good as unknown."""
        if not self._fresh:
            self._now([s / 2 for s in self._sums])
        self._fresh = False

    def _now(self, sums: list[float]) -> None:
        self._sums, self._fit_of = sums, (0.0, 0.0)
