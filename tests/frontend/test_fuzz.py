from tests.frontend.fuzz import fuzz


def test_a_thousand_random_lines_and_token_streams_affect_no_other_line():
    ends = fuzz(1000, seed=1)
    assert ends["200"] > 1000 and ends["400"] > 100 and sum(ends.values()) == 2000
