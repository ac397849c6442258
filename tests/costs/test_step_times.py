"""Known coefficients are recovered from step reports, with and without noise."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from mellmpi.costs import CostModel, StepBudget, StepTimes
from tests.scheduler.stage import report

PRIOR = CostModel()
TRUTH = np.array([4e-3, 2e-4, 7e-4, 5e-8])


def steps(rng: random.Random, truth=TRUTH, noise: float = 0.0, prefills: float = 0.3):
    """The report of a busy worker with random steps."""
    n, decoding = rng.randint(1, 4), rng.randint(0, 12)
    prefill = rng.choice([16, 64, 300, 512]) * n if rng.random() < prefills else 0
    attended = prefill * rng.choice([100, 1000, 4000])
    x = np.array([n, prefill, n * decoding, attended], float)
    took_s = float(x @ truth) * (rng.lognormvariate(0, noise) if noise else 1.0)
    return replace(
        report(),
        steps=n,
        prefill_tokens=prefill,
        decode_tokens=n * decoding,
        attended=attended,
        step_s=took_s,
    )


def trained(num_reports: int, worker: int = 1, seed: int = 0, times=None, **kwargs) -> StepTimes:
    times, rng = times or StepTimes(PRIOR), random.Random(seed)
    for i in range(num_reports):
        times.add(worker, steps(rng, **kwargs))
        if i % 5 == 4:
            times.fold()
    times.fold()
    return times


def test_known_coefficients_are_found():
    assert trained(300).coefficients(1) == pytest.approx(TRUTH, rel=0.02)


def predicted_s(times: StepTimes) -> list[float]:
    return [
        times.prefill_s(1, n, num_decoding) for n in (200, 2000, 6000) for num_decoding in (0, 8)
    ]


@pytest.mark.parametrize("factor", [1e-3, 0.1, 10.0, 100.0])
def test_predictions_become_right_however_wrong_the_prior_is(factor):
    found = predicted_s(trained(600, truth=TRUTH * factor))
    assert found == pytest.approx([factor * s for s in predicted_s(trained(300))], rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_noise_keeps_predictions_of_long_prefills_within_a_quarter(seed):
    times = trained(600, seed=seed, noise=0.3)
    true_s = trained(300).prefill_s(1, 2000, num_decoding=4)
    assert times.prefill_s(1, 2000, num_decoding=4) == pytest.approx(true_s, rel=0.25)


def test_rare_outliers_do_not_spoil_the_prediction():
    times, rng = StepTimes(PRIOR), random.Random(3)
    for i in range(600):
        usual = steps(rng)
        times.add(1, replace(usual, step_s=usual.step_s * (50 if i % 20 == 19 else 1)))
        times.fold()
    assert times.prefill_s(1, 2000) == pytest.approx(trained(300).prefill_s(1, 2000), rel=0.3)


def test_the_prefill_time_is_not_forgotten_while_there_are_only_decodes():
    times = trained(300)
    before = times.coefficients(1)[1]
    trained(3000, times=times, prefills=0.0)
    assert times.coefficients(1)[1] == pytest.approx(before, rel=0.1)


def test_an_unmeasured_coefficient_scales_with_the_others():
    fast = np.array([PRIOR.step_s, PRIOR.prefill_token_s, PRIOR.decode_token_s, 0.0]) / 50
    times = trained(300, truth=fast, prefills=0.0)
    assert times.coefficients(1)[1] == pytest.approx(fast[1], rel=0.1)


def test_a_change_of_the_step_times_is_followed():
    times = trained(300)
    trained(800, times=times, truth=2 * TRUTH, seed=1)
    assert predicted_s(times) == pytest.approx([2 * s for s in predicted_s(trained(300))], rel=0.1)


def test_each_worker_has_its_own_times_and_one_without_reports_the_common_ones():
    times = trained(300, worker=1)
    trained(300, worker=2, truth=3 * TRUTH, times=times, seed=1)
    assert times.coefficients(1) == pytest.approx(TRUTH, rel=0.05)
    assert times.coefficients(2) == pytest.approx(3 * TRUTH, rel=0.05)
    assert (times.coefficients(3) == times.coefficients()).all()


def test_reports_without_steps_are_ignored():
    times = StepTimes(PRIOR)
    times.add(1, replace(report(), steps=0))
    times.add(1, replace(report(), step_s=0.0))
    assert not times.fold()
    assert times.coefficients(1)[:3] == pytest.approx(
        [PRIOR.step_s, PRIOR.prefill_token_s, PRIOR.decode_token_s]
    )


def test_a_long_prefill_costs_its_steps_its_positions_and_the_positions_they_attend_to():
    times = StepTimes(CostModel(prefill_token_s=8.192, step_s=2.0, decode_token_s=0.5))
    chunks = 3  # of 100 less 4 decoding
    expected = chunks * (2.0 + 4 * 0.5) + 200 * 8.192 + 200 * 200 / 2 * 1e-3
    times.begin(1, StepBudget(100, math.inf), ())
    assert times.prefill_s(1, 200, num_decoding=4) == pytest.approx(expected)
    assert times.prefill_s(1, 0) == 0.0


# --- current duration of a step ------------------------------------------------------------------


def paced(*reports) -> StepTimes:
    times = StepTimes(PRIOR)
    for num_steps, step_s in reports:
        times.add(1, replace(report(), steps=num_steps, step_s=num_steps * step_s))
    return times


def test_the_pace_of_a_worker_without_reports_is_zero():
    assert paced().pace_s(1) == 0.0 and paced((1, 0.02)).pace_s(2) == 0.0


def test_one_long_prefill_does_not_change_the_pace_and_the_third_does():
    usual = [(4, 0.02)] * 5
    assert paced(*usual, (1, 0.8)).pace_s(1) == pytest.approx(0.02)
    assert paced(*usual, *[(1, 0.8)] * 3).pace_s(1) == pytest.approx(0.8)


def test_a_report_without_steps_does_not_change_the_pace():
    assert paced((4, 0.02), (0, 0.0), (0, 1.0)).pace_s(1) == pytest.approx(0.02)


def test_where_the_prior_says_that_steps_take_no_time_the_pace_stays_zero():
    times = StepTimes(replace(PRIOR, step_s=0.0))
    times.add(1, replace(report(), steps=2, step_s=0.08))
    assert times.pace_s(1) == 0.0


# --- what a chunk costs beside its positions -----------------------------------------------------


def test_a_fixed_cost_of_chunks_does_not_count_as_decoding():
    """Else the step target, a multiple of a decode-only step, would grow with it."""
    times = trained(300, prefills=0.0)
    decode_only_s = times.coefficients(1)[[0, 2]] @ [1, 8]
    for _ in range(500):
        took_s = float(np.array([1, 12, 8, 12_000]) @ TRUTH) + 0.05
        mixed = dict(steps=1, prefill_tokens=12, decode_tokens=8, attended=12_000, step_s=took_s)
        times.add(1, replace(report(), **mixed))
        times.fold()
    assert times.coefficients(1)[[0, 2]] @ [1, 8] == pytest.approx(decode_only_s, rel=0.02)
    prompts_s = times.coefficients(1)[[1, 3]] @ [12, 12_000]
    assert prompts_s == pytest.approx(0.05 + float(TRUTH[[1, 3]] @ [12, 12_000]), rel=0.05)
