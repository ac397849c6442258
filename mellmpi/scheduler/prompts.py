"""Prompt tokens that workers still have to compute, as far as rank 0 knows."""

from collections import Counter


class QueuedPrompts:
    """Tokens of assigned requests, less those that step reports say are computed."""

    def __init__(self) -> None:
        self.total = 0  # tokens of all workers that are not computed yet
        self._assigned: Counter[int] = Counter()  # by worker: tokens of requests without output
        self._computed: Counter[int] = Counter()  # by worker: of these, computed

    def add(self, worker: int, num_tokens: int) -> None:
        """Count a request that the worker has been assigned."""
        self._assigned[worker] += num_tokens
        self.total += num_tokens

    def end(self, worker: int, num_tokens: int) -> None:
        """Undo `add`: the request decodes, or leaves the worker."""
        before = self.at(worker)
        self._assigned[worker] -= num_tokens
        self._computed[worker] = max(0, self._computed[worker] - num_tokens)
        self.total += self.at(worker) - before

    def computed(self, worker: int, num_tokens: int) -> None:
        """Count reported tokens. They may include those of a migration, hence the minimum."""
        done = min(num_tokens, self.at(worker))
        self._computed[worker] += done
        self.total -= done

    def at(self, worker: int) -> int:
        """Tokens that the worker has not reported as computed yet."""
        return self._assigned[worker] - self._computed[worker]
