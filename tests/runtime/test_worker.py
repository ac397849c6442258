"""The loop of a worker that receives a sequence, the test being scheduler and source."""

import itertools

import pytest

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.protocol import ROUNDS, Assign, KvPayload, KvReceived, ReceiveKv, StepReport
from mellmpi.runtime.worker import Worker
from mellmpi.transport import LocalNetwork
from tests.runtime.cell import BLOCK_SIZE, HashEngine, request

TAG = ROUNDS * 9


class Destination:
    """Worker 2, that decodes a request of its own and awaits another, of one block."""

    def __init__(self, patience):
        network = LocalNetwork(2)
        self.scheduler, self.source, own = network.transports
        looks = itertools.count()
        self.worker = Worker(
            own,
            lambda: HashEngine(8),
            BatchConfig(),
            CacheConfig(block_size=BLOCK_SIZE),
            lambda: 1e-5 * next(looks),
            patience,
        )
        self.worker.start()
        self.source.attach(HashEngine(2).arena)
        self.waits, self._wait = [], own.wait
        self.on_wait = lambda: None
        own.wait = self.wait
        self.scheduler.send(2, Assign(request(1, 3, 100), 1, ()))
        self.scheduler.send(2, ReceiveKv(request(7, 3, 100), 9, 1, 1, 4, 0, ()))
        self.worker.turn()

    def wait(self, timeout_s):
        self.waits.append(timeout_s)
        self.on_wait()

    def header(self, **fields):
        values = {
            "request_id": 7,
            "epoch": 9,
            "fingerprint": "hash hash",
            "first_block": 0,
            "num_blocks": 1,
            "num_computed": 3,
            "outputs": (),
            "logprobs": (),
            "last": False,
            "tag": TAG,
        }
        self.source.send(2, KvPayload(**(values | fields)))

    def stop(self):
        """The source has stopped; its block is on its way."""
        self.header(first_block=1, num_blocks=0, outputs=(5,), last=True)

    def told(self, kind):
        return [m for _, m in self.scheduler.poll() if isinstance(m, kind)]


@pytest.fixture
def destination():
    return Destination(patience=10.0)


def test_what_is_only_announced_is_not_waited_for(destination):
    destination.header()
    destination.worker.turn()
    assert not destination.waits


def test_what_has_stopped_is_given_a_moment_and_decodes_in_the_very_next_step(destination):
    destination.header()
    destination.worker.turn()
    destination.stop()
    destination.on_wait = lambda: destination.source.send_blocks(2, TAG, [1])
    destination.told(object)
    destination.worker.turn()
    assert len(destination.waits) == 1
    destination.worker._report(0.0)
    said = destination.told((KvReceived, StepReport))
    assert isinstance(said[0], KvReceived) and said[0].epoch == 9
    assert 9 in said[-1].epochs, "a token of it"


def test_it_waits_no_longer_than_that_and_only_once(destination):
    destination.header()
    destination.stop()
    for _ in range(3):
        destination.worker.turn()
    waits = list(destination.waits)
    assert waits and waits == sorted(waits, reverse=True)
    destination.worker.turn()
    assert destination.waits == waits


def test_without_patience_it_never_waits():
    destination = Destination(patience=0.0)
    destination.header()
    destination.stop()
    destination.worker.turn()
    assert not destination.waits


def test_what_has_come_already_needs_no_wait(destination):
    destination.header()
    destination.source.send_blocks(2, TAG, [1])
    for _ in range(2):
        destination.worker.turn()
    destination.stop()
    destination.worker.turn()
    assert not destination.waits and destination.told(KvReceived)
