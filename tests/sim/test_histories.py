"""A thousand seeded fault histories; a failure names its seed."""

from collections import Counter
from functools import cache

import pytest

from tests.sim.histories import check, random_history
from tests.sim.witness import CASES, ROWS, Witness

HISTORIES, CHUNK = 1000, 50
CHUNKS = range(0, HISTORIES, CHUNK)


@cache
def run(first: int) -> Counter[str]:
    """Check a chunk of histories. Returns the rows and cases that they cover."""
    seen: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        sim, requests = random_history(seed, Witness)
        try:
            check(sim, requests)
        except Exception as error:
            raise AssertionError(f"history {seed}: {error}") from error
        seen += sim.seen
    return seen


@pytest.mark.parametrize("first", CHUNKS)
def test_no_token_is_lost_repeated_or_wrong_and_no_block_leaks(first):
    run(first)


def test_the_histories_cover_every_row_of_the_transition_table_and_every_special_case():
    seen = sum((run(first) for first in CHUNKS), Counter())
    rows = {name for name in seen if " -> " in name}
    assert rows == ROWS, rows ^ ROWS
    assert seen.keys() >= CASES, CASES - seen.keys()
    print({name: seen[name] for name in sorted(ROWS | CASES)})
