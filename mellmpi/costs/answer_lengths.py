"""Lengths of the answers that ended last: the scheduler's only knowledge of output lengths."""

import numpy as np

MEMORY = 4096  # answers


class AnswerLengths:
    """Ring buffer of the last `MEMORY` answers."""

    def __init__(self) -> None:
        self.output = np.zeros(MEMORY, np.int64)  # tokens
        self.total = 0  # answers added so far: min(total, MEMORY) rows are valid
        self._output_sum = 0  # tokens, over the valid rows

    def __len__(self) -> int:
        return min(self.total, MEMORY)

    def mean_output(self, default: float) -> float:
        """Mean output length in tokens; `default` before the first answer has ended."""
        return self._output_sum / len(self) if self.total else default

    def add(self, num_outputs: int) -> None:
        row = self.total % MEMORY
        self._output_sum += num_outputs - int(self.output[row])
        self.output[row] = num_outputs
        self.total += 1
