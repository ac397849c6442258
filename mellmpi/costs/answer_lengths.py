"""How long answers are: those that ended lately, which is all that is known of those to come."""

import numpy as np

MEMORY = 4096  # answers


class AnswerLengths:
    """The last answers that ended, in two columns; the oldest is overwritten first."""

    def __init__(self) -> None:
        self.prompt = np.zeros(MEMORY, np.int64)  # tokens
        self.output = np.zeros(MEMORY, np.int64)  # tokens
        self.total = 0  # answers ever seen: min(total, MEMORY) rows are valid
        self._outputs = 0  # tokens of the valid ones

    def __len__(self) -> int:
        return min(self.total, MEMORY)

    def mean_output(self, default: float) -> float:
        """Tokens; `default` as long as none has ended."""
        return self._outputs / len(self) if self.total else default

    def add(self, num_prompt: int, num_outputs: int) -> None:
        row = self.total % MEMORY
        self._outputs += num_outputs - int(self.output[row])
        self.prompt[row], self.output[row] = num_prompt, num_outputs
        self.total += 1
