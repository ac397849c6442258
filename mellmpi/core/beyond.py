"""What moves take beyond their bytes and their computing, fitted from the moves themselves.

took_s = fixed + stretch · work_s, by least squares. Messages that wait for step boundaries are
fixed; a processor that receives and computes at once stretches the work. Errors count relative to
what it took: short moves say what is fixed, long ones what is stretched.
"""

import numpy as np

from mellmpi.core.cost import least_squares

FIXED_S = 5e-3  # before anything was measured
FORGET = 0.85  # weight of the past, a move
INERTIA = np.array([0.02, 0.2])  # moves that the prior counts as: what is fixed is but a guess
OUTLIER = 3.0  # times less than predicted: most of it was already there


class Beyond:
    """Moves of one kind. With no moves yet, what `like` says; or FIXED_S, and no stretch."""

    def __init__(self, like: "Beyond | None" = None):
        self._like = like
        self._xx, self._xy = np.zeros((2, 2)), np.zeros(2)
        self._fresh = False  # since `age`

    def _found(self) -> np.ndarray:
        """float64 [2]: seconds that are fixed, and the stretch."""
        prior = np.array([FIXED_S, 1.0]) if self._like is None else self._like._found()
        weight = INERTIA / np.maximum(prior, [1e-6, 1e-3]) ** 2
        return least_squares(self._xx + np.diag(weight), self._xy + weight * prior)

    def took_s(self, work_s: float) -> float:
        """What a move with so much work is expected to take."""
        fixed_s, stretch = self._found().tolist()
        return float(fixed_s + stretch * work_s)

    def add(self, work_s: float, took_s: float) -> None:
        """A move is over."""
        expected_s = self.took_s(work_s)
        took_s = max(took_s, expected_s / OUTLIER, 1e-6)
        # Relative to between the two: to what was expected, a slow one would count too much, and
        # to what it took, a change for the worse too little.
        size_s = (expected_s * took_s) ** 0.5
        z = np.array([1.0, work_s]) / size_s
        self._xx = FORGET * self._xx + np.outer(z, z)
        self._xy = FORGET * self._xy + z * (took_s / size_s)
        self._fresh = True

    def age(self) -> None:
        """Time has passed: where no move was seen in it, half is as good as unknown."""
        if not self._fresh:
            self._xx, self._xy = self._xx / 2, self._xy / 2
        self._fresh = False
