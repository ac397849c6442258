"""What a step takes on each worker, fitted from the steps themselves.

step_s = a·steps + b·prefilled + c·decoded + d·attended, by least squares over the reports. Errors
count relative to the step, and a coefficient is forgotten only as fast as it is measured anew:
what prefilling took stays known through a minute of nothing but decoding.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import median

import numpy as np

from mellmpi.costs.cost_model import CostModel, least_squares
from mellmpi.costs.step_budget import StepBudget, StepSeconds, chunk_s
from mellmpi.protocol import StepReport

FORGET = 0.96  # weight of the past, a report that is wholly about one coefficient
INERTIA = 0.01  # reports that the estimate so far counts as, where nothing else is known
SCALE_BLEND = 0.05  # weight of the newest report in the ratio to the prior
OUTLIER = 4.0  # times the prediction: more is something else, such as a process not scheduled
BELIEVED = 16  # reports after which outliers are bounded
KNOWN = 0.5  # reports wholly about one coefficient, before which it goes with the scale
ATTENDED = 8192  # looked-back positions that cost what one prefilled position does, at first
EXPECTED = StepBudget(max_tokens=512, target_s=math.inf)  # of steps, unless told
PACE_REPORTS = 5  # newest ones, of which the median is what a step takes just now


class _Fit:
    """Coefficients in units of a prior: all ones is the prior itself."""

    def __init__(self, unit: np.ndarray):
        self.unit = unit  # float64 [4], seconds
        self._scale, self._count = 1.0, 0  # of the prior as a whole; reports
        self._found, self._seen = np.ones(4), np.zeros(4)
        self._xx = np.zeros((4, 4))

    @property
    def found(self) -> np.ndarray:
        """float64 [4]; what was never measured goes with the scale of the rest."""
        return np.where(self._seen < KNOWN, self._scale, self._found)

    def add(self, x: np.ndarray, took_s: np.ndarray) -> None:
        """x float64 [reports, 4], took_s float64 [reports]."""
        before = self.found
        expected = np.maximum(x @ (self.unit * before), 1e-12)
        if self._count >= BELIEVED:
            took_s = took_s.clip(expected / OUTLIER, expected * OUTLIER)
        # Errors count relative to the step, as expected or, where that is far off, as it was.
        size = expected.clip(took_s / OUTLIER, took_s * OUTLIER)
        z = x * self.unit / size[:, None]
        shares = np.minimum(z * before, 1.0).sum(axis=0)
        keep = np.sqrt(FORGET**shares)
        past = self._xx * np.outer(keep, keep)
        inertia = np.diag(INERTIA / np.maximum(before, 0.01 * self._scale) ** 2)
        self._xx = past + z.T @ z
        self._found = least_squares(
            self._xx + inertia, (past + inertia) @ before + z.T @ (took_s / size)
        )
        self._seen += shares
        self._rescale(took_s / np.maximum(x @ self.unit, 1e-12))

    def _rescale(self, ratios: np.ndarray) -> None:
        for ratio in ratios.tolist():
            self._count += 1
            blend = max(SCALE_BLEND, 1 / self._count)
            self._scale += blend * (ratio - self._scale)


class StepTimes:
    """One fit a worker, and one of all together for workers that have not said enough."""

    def __init__(self, prior: CostModel):
        prefill_s = prior.prefill_token_s
        self._unit = np.array([prior.step_s, prefill_s, prior.decode_token_s, prefill_s / ATTENDED])
        self._all = _Fit(self._unit)
        self._fits: dict[int, _Fit] = {}
        self._budgets: dict[int, StepBudget] = {}
        self._new: list[tuple[int, tuple[float, ...]]] = []
        self._pace: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=PACE_REPORTS))

    def begin(self, worker: int, budget: StepBudget, measured: Sequence[float]) -> None:
        """A worker is ready: the limits of its steps, and what they took when it tried some.

        measured  seconds as `coefficients` returns them; empty: it has tried none
        """
        self._budgets[worker] = budget
        if not measured or worker in self._fits:
            return
        unit = np.maximum(np.array(measured, np.float64), 1e-12)
        if not self._fits:
            self._all = _Fit(unit)
        self._fits[worker] = _Fit(unit)

    def pace_s(self, worker: int) -> float:
        """What a step there takes just now, whatever is in it; 0 before any."""
        return median(newest) if (newest := self._pace.get(worker)) else 0.0

    def add(self, worker: int, report: StepReport) -> None:
        """Remember a report; `fold` looks into it. Where steps are free, nothing is measured."""
        if report.steps and report.step_s > 0 and self._unit.all():
            self._pace[worker].append(report.step_s / report.steps)
            x = (report.steps, report.prefill_tokens, report.decode_tokens, report.attended)
            self._new.append((worker, (*x, report.step_s)))

    def fold(self) -> bool:
        """Take in what was added; True if there was anything."""
        new, self._new = self._new, []
        if not new:
            return False
        rows, workers = np.array([row for _, row in new]), np.array([worker for worker, _ in new])
        for worker in np.unique(workers).tolist():
            mine = rows[workers == worker]
            if worker not in self._fits:
                like = np.maximum(self._all.found, 0.01 * self._all.found.max())
                self._fits[worker] = _Fit(self._unit * like)
            self._fits[worker].add(mine[:, :4], mine[:, 4])
        self._all.add(rows[:, :4], rows[:, 4])
        return True

    def coefficients(self, worker: int | None = None) -> np.ndarray:
        """Seconds of (a step, a prefilled position, a decoded one, a position looked back on)."""
        fit = self._fits.get(worker, self._all) if worker is not None else self._all
        return np.asarray(fit.unit * fit.found)

    def seconds(self, worker: int) -> StepSeconds:
        """`coefficients` as plain numbers."""
        step_s, prefill_s, decode_s, attended_s = self.coefficients(worker).tolist()
        return step_s, prefill_s, decode_s, attended_s

    def prefill_s(self, worker: int, num_tokens: int, num_decoding: int = 0) -> float:
        """Positions [0, num_tokens) of a sequence, in the steps in which others decode."""
        if num_tokens <= 0:
            return 0.0
        seconds = self.seconds(worker)
        budget = self._budgets.get(worker, EXPECTED)
        chunk = budget.chunk(seconds, num_tokens // 2, num_decoding)
        num_steps = -(-num_tokens // chunk)
        step_s, _, decode_s, _ = seconds
        return num_steps * (step_s + num_decoding * decode_s) + chunk_s(seconds, 0, num_tokens)

    def prompt_s(self, worker: int, num_tokens: int) -> float:
        """What the same positions add to the steps in which they are computed."""
        return chunk_s(self.seconds(worker), 0, num_tokens)
