"""Short versions of `python -m tests.runtime.endurance 10000 [--mpi]`."""

from tests.runtime.endurance import endure, endure_under_mpirun


def check(found):
    # The number of requests per migration depends on the speed of the machine.
    assert found["wrong"] == [] and found["checked"] > 10
    assert not any(found["left"]) and found["in_flight"] == 0, found["left"]
    assert all(found["moves"][mode] for mode in ("transfer", "recompute", "split"))


def test_hundreds_of_migrations_with_cancels_change_no_token_and_leak_nothing():
    check(endure(num_moves=600))


def test_migrations_between_processes_with_cancels_change_no_token_and_leak_nothing():
    check(endure_under_mpirun(num_moves=300, limit_s=300))
