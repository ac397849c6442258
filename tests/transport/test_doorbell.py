import secrets
import socket

import pytest

from mellmpi.transport.doorbell import Doorbell


@pytest.fixture
def token():
    return secrets.token_hex(8)


@pytest.fixture
def bells(token):
    bells = [Doorbell(token, worker) for worker in range(2)]
    yield bells
    for bell in bells:
        bell.close()


def test_a_ring_before_the_sleep_ends_it(bells):
    assert bells[0].find([0, 1]) == {0, 1}
    bells[1].sleep(0.0)
    bells[0].ring(1)
    assert bells[1].sleep(60.0)


def test_many_rings_end_one_sleep(bells):
    bells[0].find([1])
    for _ in range(5000):
        bells[0].ring(1)
    assert bells[0].find([1]) == {1}  # its queue is full, but it exists
    assert bells[1].sleep(60.0) and not bells[1].sleep(0.0)


def test_the_owner_can_be_woken(bells):
    bells[0].wake()
    assert bells[0].sleep(60.0)


def test_doorbells_of_other_jobs_and_dead_workers_are_not_found(bells):
    stranger = Doorbell(secrets.token_hex(8), 0)
    assert stranger.find([0, 1]) == {0}
    assert bells[0].find([7]) == set()
    bells[0].ring(7)
    stranger.close()


def test_ringing_a_worker_that_has_died_does_nothing(bells):
    bells[0].find([1])
    bells[1].close()
    bells[0].ring(1)


def test_a_readable_descriptor_ends_the_sleep(bells):
    bell, (ours, theirs) = bells[0], socket.socketpair()
    with ours, theirs:
        assert not bell.sleep(0.0, [ours.fileno()])
        theirs.send(b"!")
        assert bell.sleep(60.0, [ours.fileno()])
