"""Estimated durations, and how measurements change them."""

import numpy as np
import pytest

from mellmpi.costs import CostModel

COST = CostModel(
    prefill_token_s=0.5, step_s=2.0, decode_token_s=0.25, link_Bps=100.0, link_latency_s=3.0
)


def test_estimates_are_sums_of_their_parts():
    assert COST.transfer_s(200) == 5.0
    assert COST.forward_s(prefill_tokens=4, decode_tokens=8) == 6.0


def test_the_bandwidth_of_a_transfer_is_blended_in():
    assert COST.after_transfer(400, 2.0).link_Bps == pytest.approx(0.7 * 100 + 0.3 * 200)


@pytest.mark.parametrize(("num_bytes", "transfer_s"), [(0, 1.0), (100, 0.0)])
def test_a_transfer_without_bytes_or_duration_is_ignored(num_bytes, transfer_s):
    assert COST.after_transfer(num_bytes, transfer_s) is COST


def test_measured_steps_replace_the_defaults():
    found = COST.with_steps(np.array([1.0, 2.0, 3.0, 4.0]))
    assert (found.step_s, found.prefill_token_s, found.decode_token_s) == (1.0, 2.0, 3.0)
    assert found.link_Bps == COST.link_Bps


def sums(xx, xy):
    return {"samples": 9, "xx": xx, "xy": xy}


NOTHING = {"samples": 0, "xx": [[0.0]], "xy": [0.0]}


def test_no_fitted_cost_is_below_zero():
    # Alone, the third column fits best with -1; without it the first two are 1 and 2.
    steps = sums([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [1, 2, -1])
    found = CostModel.fitted({"steps": steps, "transfers": NOTHING, "wakes": NOTHING})
    assert (found.step_s, found.prefill_token_s, found.decode_token_s) == pytest.approx((1, 2, 0))


def test_without_samples_the_default_stays():
    found = CostModel.fitted({"steps": NOTHING, "transfers": NOTHING, "wakes": NOTHING})
    assert found == CostModel()


def test_costs_that_are_not_of_a_report_are_refused():
    with pytest.raises(ValueError, match="not the costs of a report"):
        CostModel.fitted({"steps": 3})
