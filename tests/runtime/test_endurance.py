"""A short run of what `python -m tests.runtime.endurance 10000` does at length."""

from tests.runtime.endurance import endure


def test_hundreds_of_moves_in_every_way_with_cancels_change_no_token_and_leak_nothing():
    found = endure(num_moves=600)
    assert found["wrong"] == [] and found["checked"] > 50
    assert not any(found["left"]) and found["in_flight"] == 0
    assert all(found["moves"][mode] for mode in ("transfer", "recompute", "split"))
