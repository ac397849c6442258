"""Both ends of a transfer between worker 1 and worker 2, and of one large message instead."""

import threading
import time
from collections.abc import Callable
from typing import Any

from mellmpi.protocol import Cancel, KvPayload
from mellmpi.transport import Transport
from mellmpi.transport.mpi import set_yielding
from mellmpi.transport.probes import HostArena


def receive(transport: Transport, between: Callable[[], Any] = lambda: None) -> Any:
    """The next message, as a worker's loop would get it; `between`: what the loop does, too."""
    while True:
        if came := transport.poll():
            assert len(came) == 1
            return came[0][1]
        transport.progress()
        if between() is None:
            transport.wait(1.0)


def finish_transfer(
    transport: Transport, transfer: Any, between: Callable[[], Any] = lambda: None
) -> None:
    while not transfer.done:
        moved = transport.progress()
        if between() is None and not moved:
            transport.wait(0.1)
    assert not transfer.failed, transfer.reason


def header(num_blocks: int) -> KvPayload:
    return KvPayload(1, 2, "layout", 0, num_blocks, 1000, tuple(range(500)), (), True, 2)


def send(transport: Transport, num_blocks: int) -> float:
    """One round out of worker 1: seconds until worker 2 says that all is there."""
    started_s = time.perf_counter()
    transport.send(2, header(num_blocks))
    transfer = transport.send_blocks(2, 2, range(num_blocks))
    assert isinstance(receive(transport), Cancel)
    elapsed_s = time.perf_counter() - started_s
    finish_transfer(transport, transfer)
    return elapsed_s


def accept(
    transport: Transport, places: list[int], between: Callable[[], Any] = lambda: None
) -> float:
    """The same, at worker 2, into other places: seconds from header to last block."""
    assert receive(transport, between).num_blocks == len(places)
    transfer = transport.receive_blocks(1, 2, places)
    finish_transfer(transport, transfer, between)
    transport.send(1, Cancel(1, "gone"))
    return float(transfer.elapsed_s)


def one_message(comm: Any, arena: HostArena) -> float:
    """One blocking MPI_Send of as many bytes, and an answer."""
    from mpi4py import MPI

    whole, answer = [arena.blocks.ravel(), MPI.BYTE], bytearray(1)
    set_yielding(True)  # it waits inside MPI, as programs do that know nothing of ours
    started_s = time.perf_counter()
    if comm.rank == 1:
        comm.Send(whole, 2)
        comm.Recv(answer, 2)
    else:
        comm.Recv(whole, 1)
        comm.Send(answer, 1)
    took_s = time.perf_counter() - started_s
    set_yielding(False)
    return took_s


def one_message_beside(comm: Any, arena: HostArena, step: Callable[[], Any]) -> float:
    """The same into a thread of worker 2, that makes steps meanwhile."""
    ready, took = bytearray(1), []
    if comm.rank == 1:
        comm.Recv(ready, 2)
        return one_message(comm, arena)

    def receive_whole() -> None:
        comm.Send(ready, 1)
        took.append(one_message(comm, arena))

    thread = threading.Thread(target=receive_whole)
    thread.start()
    while thread.is_alive():
        step()
    return took[0]
