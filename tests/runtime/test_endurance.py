"""Short runs of what `python -m tests.runtime.endurance 10000 [--mpi]` does at length."""

from tests.runtime.endurance import endure, endure_under_mpirun


def check(found):
    # How many requests share the moves depends on how fast the machine moves them.
    assert found["wrong"] == [] and found["checked"] > 10
    assert not any(found["left"]) and found["in_flight"] == 0, found["left"]
    assert all(found["moves"][mode] for mode in ("transfer", "recompute", "split"))


def test_hundreds_of_moves_in_every_way_with_cancels_change_no_token_and_leak_nothing():
    check(endure(num_moves=600))


def test_between_processes_streams_splits_and_cancels_change_no_token_and_leak_nothing():
    check(endure_under_mpirun(num_moves=300, limit_s=300))
