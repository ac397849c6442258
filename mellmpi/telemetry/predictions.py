"""Predicted and actual seconds, bytes and downtime of migrations, by mode."""

import numpy as np

from mellmpi.telemetry.series import Sample


class Predictions:
    """(predicted, actual) pairs of successful migrations, in bounded memory."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], Sample[tuple[float, float]]] = {}  # (mode, quantity)

    def add(self, mode: str, quantity: str, predicted: float, actual: float) -> None:
        """Add one pair; `quantity` is "seconds", "bytes" or "downtime_s"."""
        self._pairs.setdefault((mode, quantity), Sample()).add((predicted, actual))

    def error(self, quantity: str) -> float | None:
        """Median of |predicted - actual| / actual over all modes; None without samples."""
        samples = (sample for (_, q), sample in self._pairs.items() if q == quantity)
        return _error([pair for sample in samples for pair in sample.items])

    def to_dict(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """{mode: {quantity: medians}}, plain data."""
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        for (mode, quantity), sample in self._pairs.items():
            predicted, actual = np.median(sample.items, axis=0).tolist()
            found.setdefault(mode, {})[quantity] = {
                "predicted": predicted,
                "actual": actual,
                "error": _error(sample.items),
            }
        return found


def _error(pairs: list[tuple[float, float]]) -> float | None:
    """Median relative error; None if no pair has an actual value above 0."""
    errors = [abs(predicted - actual) / actual for predicted, actual in pairs if actual > 0]
    return float(np.median(errors)) if errors else None
