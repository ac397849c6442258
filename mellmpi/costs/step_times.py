"""Step times of each worker, fitted to its step reports.

    step_s = a·steps + b·prefilled + c·decoded + d·attended        (least squares)

Residuals are relative to the step. A coefficient is forgotten only as fast as it is measured
again: the prefill time stays known through a minute without prompts. Once `a` and `c` are known, a
step with prompts changes only `b` and `d`: what it takes beyond its decodes is the cost of its
prompts. Otherwise the fixed cost of a chunk would count as decoding, and the step target would grow
with it, since it is a multiple of a decode-only step.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import median

import numpy as np

from mellmpi.costs.cost_model import CostModel, least_squares
from mellmpi.costs.step_budget import StepBudget, StepSeconds, chunk_s
from mellmpi.protocol import StepReport

FORGET = 0.96  # factor on the past for each report that depends on one coefficient alone
INERTIA = 0.01  # weight, in reports, of the previous estimate
SCALE_BLEND = 0.05  # weight of the newest report in the scale of the prior
OUTLIER = 4.0  # durations are clipped to this factor around the prediction
TRUSTED = 16  # reports after which durations are clipped
KNOWN = 0.5  # reports about a coefficient before which its prior, scaled, is used
ATTENDED = 8192  # attended positions that cost as much as one prefilled position, in the prior
EXPECTED = StepBudget(max_tokens=512, target_s=math.inf)  # step limits of an unknown worker
LEAST_SHARE = 0.05  # of a step with prompts that counts as their cost, however long decodes take
DECODING, PREFILLED = [0, 2], 1  # columns of x: steps and decoded positions; prefilled positions
PACE_REPORTS = 5  # newest reports, whose median is the current duration of a step


class _Fit:
    """Coefficients relative to a prior: all ones is the prior itself."""

    def __init__(self, prior: np.ndarray, calibrated: bool = False):
        self.prior, self.calibrated = prior, calibrated  # float64 [4], seconds; was it measured?
        self._scale, self._count = 1.0, 0  # of the prior as a whole; reports
        self._factors, self._weights = np.ones(4), np.zeros(4)  # weights: reports, by coefficient
        self._xx = np.zeros((4, 4))

    @property
    def factors(self) -> np.ndarray:
        """float64 [4], in units of the prior; `_scale` for coefficients not measured yet."""
        return np.where(self._weights < KNOWN, self._scale, self._factors)

    def add(self, x: np.ndarray, took_s: np.ndarray) -> None:
        """x float64 [reports, 4], took_s float64 [reports]."""
        x, took_s = self._without_decodes(x, took_s)
        before = self.factors
        expected = np.maximum(x @ (self.prior * before), 1e-12)
        if self._count >= TRUSTED:
            took_s = took_s.clip(expected / OUTLIER, expected * OUTLIER)
        # Residuals are relative to the expected duration, clipped towards the actual one.
        size = expected.clip(took_s / OUTLIER, took_s * OUTLIER)
        z = x * self.prior / size[:, None]
        shares = np.minimum(z * before, 1.0).sum(axis=0)
        keep = np.sqrt(FORGET**shares)
        past = self._xx * np.outer(keep, keep)
        inertia = np.diag(INERTIA / np.maximum(before, 0.01 * self._scale) ** 2)
        self._xx = past + z.T @ z
        self._factors = least_squares(
            self._xx + inertia, (past + inertia) @ before + z.T @ (took_s / size)
        )
        self._weights += shares
        self._rescale(took_s / np.maximum(x @ self.prior, 1e-12))

    def _without_decodes(self, x: np.ndarray, took_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reports with prompts without the known cost of their steps and decodes."""
        if not (self.calibrated or (self._weights[DECODING] >= KNOWN).all()):
            return x, took_s
        known_s = x[:, DECODING] @ (self.prior * self.factors)[DECODING]
        prompts = x[:, PREFILLED] > 0
        x = x.copy()
        for column in DECODING:
            x[prompts, column] = 0.0
        return x, np.where(prompts, np.maximum(took_s - known_s, LEAST_SHARE * took_s), took_s)

    def _rescale(self, ratios: np.ndarray) -> None:
        for ratio in ratios.tolist():
            self._count += 1
            blend = max(SCALE_BLEND, 1 / self._count)
            self._scale += blend * (ratio - self._scale)


class StepTimes:
    """One fit for each worker, and a common one for workers without reports."""

    def __init__(self, prior: CostModel):
        prefill_s = prior.prefill_token_s
        self._prior = np.array(
            [prior.step_s, prefill_s, prior.decode_token_s, prefill_s / ATTENDED]
        )
        self._common = _Fit(self._prior)
        self._fits: dict[int, _Fit] = {}
        self._budgets: dict[int, StepBudget] = {}
        self._new: list[tuple[int, tuple[float, ...]]] = []  # worker, (x of `_Fit.add`, seconds)
        self._pace: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=PACE_REPORTS))

    def begin(self, worker: int, budget: StepBudget, measured: Sequence[float]) -> None:
        """Register a worker with its step limits and its calibration.

        measured  seconds in the order of `coefficients`; empty without a calibration
        """
        self._budgets[worker] = budget
        if not measured or worker in self._fits:
            return
        prior = np.maximum(np.array(measured, np.float64), 1e-12)
        if not self._fits:
            self._common = _Fit(prior, calibrated=True)
        self._fits[worker] = _Fit(prior, calibrated=True)

    def pace_s(self, worker: int) -> float:
        """Current seconds of a step, whatever it computes; 0 before the first report."""
        return median(newest) if (newest := self._pace.get(worker)) else 0.0

    def add(self, worker: int, report: StepReport) -> None:
        """Keep a report for the next `fold`. Ignored where the prior's steps take no time."""
        if report.steps and report.step_s > 0 and self._prior.all():
            self._pace[worker].append(report.step_s / report.steps)
            x = (report.steps, report.prefill_tokens, report.decode_tokens, report.attended)
            self._new.append((worker, (*x, report.step_s)))

    def fold(self) -> bool:
        """Fit the reports added since the last call; False if there are none."""
        new, self._new = self._new, []
        if not new:
            return False
        rows, workers = np.array([row for _, row in new]), np.array([worker for worker, _ in new])
        for worker in np.unique(workers).tolist():
            own = rows[workers == worker]
            if worker not in self._fits:
                common = np.maximum(self._common.factors, 0.01 * self._common.factors.max())
                self._fits[worker] = _Fit(self._prior * common)
            self._fits[worker].add(own[:, :4], own[:, 4])
        self._common.add(rows[:, :4], rows[:, 4])
        return True

    def coefficients(self, worker: int | None = None) -> np.ndarray:
        """Seconds of (a step, a prefilled position, a decoded one, an attended one): float64 [4].

        Those of all workers together without `worker`, or for a worker without reports.
        """
        fit = self._fits.get(worker, self._common) if worker is not None else self._common
        return np.asarray(fit.prior * fit.factors)

    def seconds(self, worker: int) -> StepSeconds:
        """`coefficients` as plain numbers."""
        step_s, prefill_s, decode_s, attended_s = self.coefficients(worker).tolist()
        return step_s, prefill_s, decode_s, attended_s

    def prefill_s(self, worker: int, num_tokens: int, num_decoding: int = 0) -> float:
        """Seconds to compute positions [0, num_tokens) in steps with `num_decoding` sequences."""
        if num_tokens <= 0:
            return 0.0
        seconds = self.seconds(worker)
        budget = self._budgets.get(worker, EXPECTED)
        chunk = budget.chunk(seconds, num_tokens // 2, num_decoding)
        num_steps = -(-num_tokens // chunk)
        step_s, _, decode_s, _ = seconds
        return num_steps * (step_s + num_decoding * decode_s) + chunk_s(seconds, 0, num_tokens)

    def prompt_s(self, worker: int, num_tokens: int) -> float:
        """Seconds that positions [0, num_tokens) add to the steps that compute them."""
        return chunk_s(self.seconds(worker), 0, num_tokens)
