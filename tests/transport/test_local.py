import socket
import threading
import traceback

import pytest

from mellmpi.protocol import Cancel, WorkerLost
from mellmpi.transport import LocalNetwork
from tests.transport.conformance import SCENARIOS
from tests.transport.participant import LIMIT_S, HostArena, Participant


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_the_local_transport_keeps_the_contract(scenario):
    network, errors = LocalNetwork(num_workers=3, checksums=True), []

    def run(transport):
        try:
            scenario(Participant(transport))
        except BaseException:
            errors.append(f"address {transport.worker}: {traceback.format_exc()}")

    threads = [threading.Thread(target=run, args=(t,), daemon=True) for t in network.transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LIMIT_S)
    assert not errors and not any(thread.is_alive() for thread in threads), "\n".join(errors)


def test_a_lost_worker_is_reported_once_to_everyone_else_after_its_last_message():
    network = LocalNetwork(num_workers=2)
    scheduler, one, two = network.transports
    one.send(0, Cancel(1, "gone"))
    network.lose(1)
    one.send(0, Cancel(2, "gone"))
    assert scheduler.poll() == [(1, Cancel(1, "gone")), (1, WorkerLost(1))]
    assert two.poll() == [(1, WorkerLost(1))]
    assert scheduler.poll() == two.poll() == []


def test_transfers_with_a_lost_worker_end_as_failed():
    network = LocalNetwork(num_workers=2)
    _, one, two = network.transports
    arenas = [HostArena(4) for _ in range(2)]
    for transport, arena in zip((one, two), arenas, strict=True):
        transport.attach(arena)
    transfers = [
        two.receive_blocks(1, 1, [0]),
        two.send_blocks(1, 2, [1]),
        two.drain_blocks(1, 3, 1),
    ]
    network.lose(1)
    late = [two.receive_blocks(1, 1, [0]), two.send_blocks(1, 2, [1]), two.drain_blocks(1, 3, 1)]
    assert all(t.done and t.failed for t in transfers + late)
    two.attach(None)


def test_close_ends_unfinished_receives():
    network = LocalNetwork(num_workers=2)
    two = network.transports[2]
    two.attach(HostArena(1))
    transfer = two.receive_blocks(1, 1, [0])
    two.close()
    assert transfer.done and transfer.failed


def test_a_readable_descriptor_ends_a_wait():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"!")
        LocalNetwork(1).transports[0].wait(60.0, [ours.fileno()])
