"""Overhead of migrations over their expected waiting and work, fitted to finished migrations.

    took_s = waits · wait_s + stretch · work_s        (least squares, waits >= 0, stretch >= 0)

`wait_s` is the expected time of messages and of the step boundaries that a migration waits for;
`work_s` that of its transfer or computation, which takes longer on a processor that also receives.
Residuals are relative, so that short migrations determine `waits` and long ones `stretch`.
"""

FORGET = 0.85  # factor on the past sums for each new migration
INERTIA = (0.1, 0.2)  # weight of the prior's two factors, in migrations
OUTLIER = 3.0  # durations are clipped to this factor around the prediction


class MigrationOverhead:
    """The two factors for migrations of one kind. Prior: `prior`, or 1 and 1 without one."""

    def __init__(self, prior: "MigrationOverhead | None" = None):
        self._prior = prior
        self._sums = [0.0] * 5  # wait², wait · work, work², wait · took, work · took
        self._fit, self._fitted_with = (0.0, 0.0), (0.0, 0.0)  # factors, and the prior's then
        self._fresh = False  # a migration was added since the last `age`

    def _factors(self) -> tuple[float, float]:
        """(waits, stretch), fitted again if the sums or the prior have changed."""
        prior = (1.0, 1.0) if self._prior is None else self._prior._factors()
        if prior != self._fitted_with:
            self._fit, self._fitted_with = self._solve(*prior), prior
        return self._fit

    def _solve(self, waits: float, stretch: float) -> tuple[float, float]:
        """Non-negative least squares around this prior; in closed form: called for every plan."""
        aa, ab, bb, at, bt = self._sums
        weights = INERTIA[0] / max(waits, 1e-3) ** 2, INERTIA[1] / max(stretch, 1e-3) ** 2
        aa, at = aa + weights[0], at + weights[0] * waits
        bb, bt = bb + weights[1], bt + weights[1] * stretch
        determinant = aa * bb - ab * ab
        found = (at * bb - bt * ab) / determinant, (aa * bt - ab * at) / determinant
        if min(found) >= 0:
            return found
        return (0.0, bt / bb) if found[0] < found[1] else (at / aa, 0.0)

    def total_s(self, wait_s: float, work_s: float) -> float:
        """Expected seconds of a migration with this waiting and work."""
        waits, stretch = self._factors()
        return waits * wait_s + stretch * work_s

    def add(self, wait_s: float, work_s: float, took_s: float) -> None:
        """Add a finished migration. Its residual is weighted by 1 / (expected · actual)."""
        expected_s = max(self.total_s(wait_s, work_s), 1e-6)
        took_s = min(max(took_s, expected_s / OUTLIER), expected_s * OUTLIER)
        size2 = expected_s * took_s
        seen = wait_s * wait_s, wait_s * work_s, work_s * work_s, wait_s * took_s, work_s * took_s
        self._set_sums([FORGET * s + v / size2 for s, v in zip(self._sums, seen, strict=True)])
        self._fresh = True

    def age(self) -> None:
        """Halve the sums if no migration was added since the last call."""
        if not self._fresh:
            self._set_sums([s / 2 for s in self._sums])
        self._fresh = False

    def _set_sums(self, sums: list[float]) -> None:
        self._sums, self._fitted_with = sums, (0.0, 0.0)
