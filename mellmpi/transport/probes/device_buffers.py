"""A test program for two ranks: they exchange device memory and compare the contents.

See `devices.device_buffers_work`. Messages are sent as in migrations: over the same channel, by
address, several in flight, of sizes that MPI treats differently, between two GPUs if there are two,
and from a thread that has never called CUDA (as the progress thread).
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from mellmpi.transport.channel import Channel

SIZES = (2 << 10, 48 << 10, 400_000, 4 << 20)  # bytes: eager and rendezvous messages
TAG = 7
POLL_S = 100e-6  # between two polls


def main(device: str) -> None:
    from mellmpi.transport.mpi import MPI, MpiChannel  # calls MPI_Init

    comm = MPI.COMM_WORLD
    own, other = own_device(device, comm.rank), 1 - comm.rank
    sent = pattern(comm.rank).to(own)
    received = torch.zeros(sum(SIZES), dtype=torch.uint8, device=own)
    synchronize(own)
    channel = MpiChannel(comm, acquire=lambda: None, release=lambda: None)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(exchange, channel, other, sent.data_ptr(), received.data_ptr()).result()
    synchronize(own)
    correct = comm.allreduce(torch.equal(received.cpu(), pattern(other)), MPI.LAND)
    if not correct:
        raise SystemExit("the values differ")
    if comm.rank == 0:
        sys.stdout.write("device buffers work\n")
    MPI.Finalize()


def own_device(device: str, rank: int) -> torch.device:
    """The device of this rank: the second rank takes the next GPU, if there is one."""
    first = torch.device(device)
    if first.type == "cpu":
        return first
    return torch.device("cuda", ((first.index or 0) + rank) % torch.cuda.device_count())


def pattern(rank: int) -> torch.Tensor:
    """uint8 [sum(SIZES)], on the CPU; different for each rank and each message."""
    return ((torch.arange(sum(SIZES)) * (7 + 4 * rank) + rank) % 251).to(torch.uint8)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def exchange(channel: Channel, other: int, source: int, target: int) -> None:
    """Send and receive one message of each size.

    source, target  addresses of buffers of sum(SIZES) bytes
    """
    requests = []
    for size in SIZES:
        requests.append(channel.receive(target, size, other, TAG))
        requests.append(channel.send(source, size, other, TAG))
        source, target = source + size, target + size
    while requests:
        requests = [r for r in requests if channel.finished(r) is None]
        time.sleep(POLL_S)


if __name__ == "__main__":
    main(sys.argv[1])
