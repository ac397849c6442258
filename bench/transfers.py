"""Both ends of a transfer from worker 1 to worker 2, and of one large message instead."""

import threading
import time
from collections.abc import Callable
from typing import Any

from mellmpi.protocol import Cancel, KvPayload
from mellmpi.transport import Transport
from mellmpi.transport.probes import HostArena


def receive(transport: Transport, between: Callable[[], Any] = lambda: None) -> Any:
    """Returns the next message; `between` is called in each iteration, as by a worker's loop."""
    while True:
        if messages := transport.poll():
            assert len(messages) == 1
            return messages[0][1]
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
    """At worker 1: send a transfer. Returns seconds until worker 2 has received all."""
    started_s = time.perf_counter()
    transport.send(2, header(num_blocks))
    transfer = transport.send_blocks(2, 2, range(num_blocks))
    assert isinstance(receive(transport), Cancel)
    elapsed_s = time.perf_counter() - started_s
    finish_transfer(transport, transfer)
    return elapsed_s


def accept(
    transport: Transport, block_ids: list[int], between: Callable[[], Any] = lambda: None
) -> float:
    """At worker 2: receive a transfer. Returns seconds from header to last block."""
    assert receive(transport, between).num_blocks == len(block_ids)
    transfer = transport.receive_blocks(1, 2, block_ids)
    finish_transfer(transport, transfer, between)
    transport.send(1, Cancel(1, "gone"))
    return float(transfer.elapsed_s)


def one_message(comm: Any, arena: HostArena) -> float:
    """Send the arena with one blocking MPI_Send and wait for an answer. Returns seconds."""
    from mpi4py import MPI

    whole, answer = [arena.blocks.ravel(), MPI.BYTE], bytearray(1)
    from mellmpi.transport.mpi import set_yielding  # starts MPI: in a rank only

    set_yielding(True)  # blocking calls wait inside MPI
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


def one_message_during(comm: Any, arena: HostArena, step: Callable[[], Any] | None) -> float:
    """As `one_message`, but a thread of worker 2 receives while its main thread makes steps."""
    ready, took = bytearray(1), []
    if comm.rank == 1:
        comm.Recv(ready, 2)
        return one_message(comm, arena)

    assert step is not None

    def receive_message() -> None:
        comm.Send(ready, 1)
        took.append(one_message(comm, arena))

    thread = threading.Thread(target=receive_message)
    thread.start()
    while thread.is_alive():
        step()
    return took[0]
