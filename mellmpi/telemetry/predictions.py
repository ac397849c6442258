"""What was predicted of moves, beside what they took: by way, in bounded memory."""

from typing import Any

import numpy as np

from mellmpi.telemetry.series import Sample


class Predictions:
    """Of moves that succeeded: seconds, bytes and downtime."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], Sample] = {}

    def add(self, mode: str, what: str, predicted: float, actual: float) -> None:
        """One more; `what` says what of it, and its unit."""
        self._pairs.setdefault((mode, what), Sample()).add((predicted, actual))

    def error(self, what: str) -> float | None:
        """|predicted - actual| / actual in the median of all ways; None without samples."""
        pairs = [
            pair for (_, of), sample in self._pairs.items() if of == what for pair in sample.items
        ]
        return _error(pairs) if pairs else None

    def to_dict(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """{way: {what: medians}}, plain data."""
        found: dict[str, Any] = {}
        for (mode, what), sample in self._pairs.items():
            predicted, actual = np.median(sample.items, axis=0).tolist()
            found.setdefault(mode, {})[what] = {
                "predicted": predicted,
                "actual": actual,
                "error": _error(sample.items),
            }
        return found


def _error(pairs: list[tuple[float, float]]) -> float | None:
    """Relative, in the median; None where nothing was measured."""
    errors = [abs(predicted - actual) / actual for predicted, actual in pairs if actual > 0]
    return float(np.median(errors)) if errors else None
