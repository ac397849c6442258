"""What moves take beyond their bytes and their computing, fitted from the moves themselves.

took_s = fixed + stretch · work_s, by least squares. Messages that wait for step boundaries are
fixed; a processor that receives and computes at once stretches the work. Errors count relative to
what it took: short moves say what is fixed, long ones what is stretched.
"""

FIXED_S = 5e-3  # before anything was measured
FORGET = 0.85  # weight of the past, a move
INERTIA = (0.02, 0.2)  # moves that the prior counts as: what is fixed is but a guess
OUTLIER = 3.0  # times less than predicted: most of it was already there


class Beyond:
    """Moves of one kind. With no moves yet, what `like` says; or FIXED_S, and no stretch."""

    def __init__(self, like: "Beyond | None" = None):
        self._like = like
        self._sums = [0.0] * 5  # of 1, work, work², took, work · took, each relative to size²
        self._fit, self._fit_of = (0.0, 0.0), (0.0, 0.0)  # and the prior that it is of
        self._fresh = False  # since `age`

    def _found(self) -> tuple[float, float]:
        """Seconds that are fixed, and the stretch."""
        prior = (FIXED_S, 1.0) if self._like is None else self._like._found()
        if prior != self._fit_of:
            self._fit, self._fit_of = self._fitted(*prior), prior
        return self._fit

    def _fitted(self, fixed_s: float, stretch: float) -> tuple[float, float]:
        """Least squares, in closed form since every plan asks; nothing is below zero."""
        ones, work, squares, took, both = self._sums
        weights = INERTIA[0] / max(fixed_s, 1e-6) ** 2, INERTIA[1] / max(stretch, 1e-3) ** 2
        ones, took = ones + weights[0], took + weights[0] * fixed_s
        squares, both = squares + weights[1], both + weights[1] * stretch
        volume = ones * squares - work * work
        found = (took * squares - work * both) / volume, (ones * both - work * took) / volume
        if min(found) >= 0:
            return found
        return (0.0, both / squares) if found[0] < found[1] else (took / ones, 0.0)

    def took_s(self, work_s: float) -> float:
        """What a move with so much work is expected to take."""
        fixed_s, stretch = self._found()
        return fixed_s + stretch * work_s

    def add(self, work_s: float, took_s: float) -> None:
        """A move is over."""
        expected_s = self.took_s(work_s)
        took_s = max(took_s, expected_s / OUTLIER, 1e-6)
        # Relative to between the two: to what was expected, a slow one would count too much, and
        # to what it took, a change for the worse too little.
        size2 = expected_s * took_s
        seen = 1.0, work_s, work_s * work_s, took_s, work_s * took_s
        self._now([FORGET * s + v / size2 for s, v in zip(self._sums, seen, strict=True)])
        self._fresh = True

    def age(self) -> None:
        """Time has passed: where no move was seen in it, half is as good as unknown."""
        if not self._fresh:
            self._now([s / 2 for s in self._sums])
        self._fresh = False

    def _now(self, sums: list[float]) -> None:
        self._sums, self._fit_of = sums, (0.0, 0.0)
