"""The loop of a worker that receives a sequence. The test plays scheduler and source."""

import itertools

import pytest

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.protocol import ROUNDS, Assign, KvPayload, KvReceived, ReceiveKv, StepReport
from mellmpi.runtime.worker import Worker
from mellmpi.transport import LocalNetwork
from tests.runtime.cell import BLOCK_SIZE, HashEngine, request

TAG = ROUNDS * 9


class Destination:
    """Worker 2: decodes one request, and receives another with one block."""

    def __init__(self, patience):
        network = LocalNetwork(2)
        self.scheduler, self.source, own = network.transports
        readings = itertools.count()
        self.worker = Worker(
            own,
            lambda: HashEngine(8),
            BatchConfig(),
            CacheConfig(block_size=BLOCK_SIZE),
            lambda: 1e-5 * next(readings),
            patience,
        )
        self.worker.start()
        self.source.attach(HashEngine(2).arena)
        self.waits, self._wait = [], own.wait
        self.on_wait = lambda: None
        own.wait = self.wait
        self.scheduler.send(2, Assign(request(1, 3, 100), 1, ()))
        self.scheduler.send(2, ReceiveKv(request(7, 3, 100), 9, 1, 1, 4, 0, ()))
        self.worker.run_once()

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
        """Send the last header of the source. Its block follows."""
        self.header(first_block=1, num_blocks=0, outputs=(5,), last=True)

    def received(self, kind):
        return [m for _, m in self.scheduler.poll() if isinstance(m, kind)]


@pytest.fixture
def destination():
    return Destination(patience=10.0)


def test_announced_blocks_are_not_waited_for(destination):
    destination.header()
    destination.worker.run_once()
    assert not destination.waits


def test_the_last_blocks_are_waited_for_and_the_sequence_decodes_in_the_next_step(destination):
    destination.header()
    destination.worker.run_once()
    destination.stop()
    destination.on_wait = lambda: destination.source.send_blocks(2, TAG, [1])
    destination.received(object)
    destination.worker.run_once()
    assert len(destination.waits) == 1
    destination.worker._report(0.0)
    said = destination.received((KvReceived, StepReport))
    assert isinstance(said[0], KvReceived) and said[0].epoch == 9
    assert 9 in said[-1].epochs, "a token of it"


def test_the_wait_is_bounded_and_happens_once(destination):
    destination.header()
    destination.stop()
    for _ in range(3):
        destination.worker.run_once()
    waits = list(destination.waits)
    assert waits and waits == sorted(waits, reverse=True)
    destination.worker.run_once()
    assert destination.waits == waits


def test_without_patience_there_is_no_wait():
    destination = Destination(patience=0.0)
    destination.header()
    destination.stop()
    destination.worker.run_once()
    assert not destination.waits


def test_blocks_that_have_arrived_need_no_wait(destination):
    destination.header()
    destination.source.send_blocks(2, TAG, [1])
    for _ in range(2):
        destination.worker.run_once()
    destination.stop()
    destination.worker.run_once()
    assert not destination.waits and destination.received(KvReceived)
