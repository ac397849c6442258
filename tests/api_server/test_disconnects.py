"""A few hundred clients that leave at random moments."""

from tests.api_server.disconnects import run


def test_nothing_is_left_of_clients_that_leave():
    delays, _ = run(300)
    assert len(delays) > 100
