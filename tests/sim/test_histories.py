"""A thousand seeded histories; a failure names its seed."""

import pytest

from tests.sim.histories import check, random_history

HISTORIES, CHUNK = 1000, 50


@pytest.mark.parametrize("first", range(0, HISTORIES, CHUNK))
def test_no_token_is_lost_repeated_or_wrong_and_no_block_leaks(first):
    for seed in range(first, first + CHUNK):
        try:
            check(*random_history(seed))
        except Exception as error:
            raise AssertionError(f"history {seed}: {error}") from error
