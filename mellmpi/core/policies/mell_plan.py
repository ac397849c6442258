"""MELL's packing on plain numbers: a plan of who should be where. (arXiv 2501.06709, section VI)

The rules look at what the bins hold, not at what was done before: a move that is refused or late
is found again by the next epoch. Sizes and loads are shares of a bin.
"""

from collections.abc import Sequence
from dataclasses import dataclass

T, S, M, L = 1, 2, 3, 4
WHOLE = {S: 3, M: 2, L: 1}  # items of its class in a bin that lacks none
FULL_ENOUGH = 0.75
SMALL = 1 / 8  # smaller ones travel in bundles of (1/8, 1/4]


def size_class(size: float) -> int:
    """T to 1/4, S to 1/3, M to 1/2, L above."""
    return T if size <= 1 / 4 else S if size <= 1 / 3 else M if size <= 1 / 2 else L


@dataclass
class Plan:
    """Items in bins; `where` is edited by the rules, the difference to before is the moves."""

    size: Sequence[float]
    where: list[int]
    pinned: Sequence[bool]  # stays where it is
    base: list[float]  # by bin: load that is no item, such as what is on its way here
    age: Sequence[int]  # by bin: the higher, the later it was activated
    usable: Sequence[bool]  # by bin: may take items

    def __post_init__(self) -> None:
        self.load, self.held = list(self.base), [set[int]() for _ in self.base]
        for item, b in enumerate(self.where):
            self.held[b].add(item)
            self.load[b] += self.size[item]
        self.kind = [size_class(s) for s in self.size]

    def of(self, b: int, kind: int) -> list[int]:
        """The bin's items of this class, ascending by size."""
        return sorted((i for i in self.held[b] if self.kind[i] == kind),
                      key=lambda i: (self.size[i], i))  # fmt: skip

    def bin_class(self, b: int) -> int:
        return max((self.kind[i] for i in self.held[b]), default=0)

    def move(self, items: list[int], b: int) -> None:
        for i in items:
            a = self.where[i]
            self.held[a].discard(i)
            self.load[a] -= self.size[i]
            self.where[i] = b
            self.held[b].add(i)
            self.load[b] += self.size[i]

    def bundles(self, b: int) -> list[list[int]]:
        """The bin's T's that can move: alone, or the small ones in bundles of (1/8, 1/4]."""
        done: list[list[int]] = []
        open_: list[int] = []
        for i in self.of(b, T):
            if self.pinned[i]:
                continue
            if self.size[i] > SMALL:
                done.append([i])
                continue
            open_.append(i)
            if self.total(open_) > SMALL:
                done.append(open_)
                open_ = []
        return [*done, open_] if open_ else done

    def total(self, items: list[int]) -> float:
        return sum(self.size[i] for i in items)

    def best(self, bins: list[int]) -> int | None:
        """Priority: fewest requests, then most free memory, then the lowest number."""
        return min(bins, key=lambda b: (len(self.held[b]), self.load[b], b), default=None)

    def newest(self, kind: int) -> int | None:
        bins = [b for b in range(len(self.load)) if self.bin_class(b) == kind]
        return max(bins, key=lambda b: self.age[b], default=None)

    def target(self, items: list[int], leave: int | None = None) -> int | None:
        """Where Allocate puts these (one item, or a bundle); None: there is no room."""
        size, kind = self.total(items), self.kind[items[0]]
        fits = [b for b in range(len(self.load))
                if self.usable[b] and b != leave and self.load[b] + size <= 1]  # fmt: skip
        bears = {b: self.bin_class(b) for b in fits}
        empty = min((b for b in fits if not bears[b] and not self.base[b]), default=None)
        if kind == L:
            return empty
        beside = [b for b in fits if bears[b] == L and (kind == T or not self._partner(b))]
        if kind == T:  # an M-GPU under 75 %, too: without it the paper's invariants do not hold
            beside = beside or [b for b in fits if bears[b] == M and self.load[b] < FULL_ENOUGH]
            own = [b for b in fits if bears[b] == T]
        else:
            own = [b for b in fits if bears[b] == kind and len(self.of(b, kind)) < WHOLE[kind]]
        found = self.best(beside)
        if found is None and own:
            found = max(own, key=lambda b: (self.age[b], -b))
        return empty if found is None else found

    def _partner(self, b: int) -> bool:
        return any(self.kind[i] in (S, M) for i in self.held[b])

    # --- the epoch ------------------------------------------------------------------------------

    def epoch(self) -> None:
        """Updates, then Departs: put right what growth and departures have disturbed."""
        for b in range(len(self.load)):
            self._misplaced(b)
            self._overload(b)
        for kind in (M, S):
            self._pair(kind)
            self._gather(kind)
        self._fill()

    def _misplaced(self, b: int) -> None:
        """An S or M that grew into its class among others is allocated anew."""
        bears = self.bin_class(b)
        alone = bears in (S, M) and len(self.of(b, bears)) == 1 and len(self.held[b]) > 1
        odd = self.of(b, S) if bears == M and not alone else self.of(b, bears) if alone else []
        for i in odd:
            if not self.pinned[i] and (to := self.target([i], leave=b)) is not None:
                self.move([i], to)

    def _overload(self, b: int) -> None:
        """Give away the smallest piece that cures it, else the largest, until all fits."""
        while self.load[b] > 1 and len(self.held[b]) > 1:
            pieces = self.bundles(b) + [[i] for k in (S, M) for i in self.of(b, k)]
            pieces = [p for p in pieces if not any(self.pinned[i] for i in p)]
            pieces.sort(key=lambda p: (self.load[b] - self.total(p) > 1, self.total(p)))
            for piece in pieces:
                if (to := self.target(piece, leave=b)) is not None:
                    self.move(piece, to)
                    break
            else:
                return

    def _pair(self, kind: int) -> None:
        """An L-GPU without an S/M gets one that fits, from the newest GPU that has one."""
        for b in range(len(self.load)):
            if self.bin_class(b) == L and self.usable[b] and not self._partner(b):
                self._pull(kind, b)

    def _gather(self, kind: int) -> None:
        """All S/M-GPUs but the newest are whole."""
        for b in range(len(self.load)):
            while (
                self.usable[b]
                and self.bin_class(b) == kind
                and len(self.of(b, kind)) < WHOLE[kind]
                and self._pull(kind, b)
            ):
                pass

    def _pull(self, kind: int, b: int) -> bool:
        newest = self.newest(kind)
        if newest is None or newest == b:
            return False
        for i in reversed(self.of(newest, kind)):
            if not self.pinned[i] and self.load[b] + self.size[i] <= 1:
                self.move([i], b)
                return True
        return False

    def _fill(self) -> None:
        """T's of the newest T-GPU go where there is room: all others come to 75 %."""
        for b in range(len(self.load)):
            while self.usable[b] and self.bin_class(b) in (T, M, L) and self.load[b] < FULL_ENOUGH:
                newest = self.newest(T)
                if newest is None or newest == b:
                    break
                pieces = self.bundles(newest)
                piece = next((p for p in pieces if self.load[b] + self.total(p) <= 1), None)
                if piece is None:
                    break
                self.move(piece, b)
