"""Two ranks that exchange device memory as migrations do, and compare it: see
`devices.device_buffers_work`.

As migrations do: through the same channel, by address, several messages in flight, sizes that MPI
treats differently, between two GPUs where there are two, and from a thread that has never called
CUDA, since a thread of its own carries blocks.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from mellmpi.transport.channel import Channel

SIZES = (2 << 10, 48 << 10, 400_000, 4 << 20)  # bytes: some go at once, some when asked for
TAG = 7
LOOK_S = 100e-6  # between two looks


def main(device: str) -> None:
    from mellmpi.transport.mpi import MPI, MpiChannel  # starts it

    comm = MPI.COMM_WORLD
    on, other = own_device(device, comm.rank), 1 - comm.rank
    sent, got = pattern(comm.rank).to(on), torch.zeros(sum(SIZES), dtype=torch.uint8, device=on)
    wait_for(on)
    channel = MpiChannel(comm, take=lambda: None, leave=lambda: None)
    with ThreadPoolExecutor(1) as carrier:
        carrier.submit(exchange, channel, other, sent.data_ptr(), got.data_ptr()).result()
    wait_for(on)
    right = comm.allreduce(torch.equal(got.cpu(), pattern(other)), MPI.LAND)
    if not right:
        raise SystemExit("the values differ")
    if comm.rank == 0:
        sys.stdout.write("device buffers work\n")
    MPI.Finalize()


def own_device(device: str, rank: int) -> torch.device:
    """The second rank takes the next GPU, if there is one."""
    on = torch.device(device)
    if on.type == "cpu":
        return on
    return torch.device("cuda", ((on.index or 0) + rank) % torch.cuda.device_count())


def pattern(rank: int) -> torch.Tensor:
    """uint8 [sum(SIZES)], on the CPU; of no other rank, and no two messages alike."""
    return ((torch.arange(sum(SIZES)) * (7 + 4 * rank) + rank) % 251).to(torch.uint8)


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def exchange(channel: Channel, other: int, source: int, target: int) -> None:
    """All messages, both ways. `source`, `target`: addresses of buffers that hold them in a row."""
    requests = []
    for size in SIZES:
        requests.append(channel.receive(target, size, other, TAG))
        requests.append(channel.send(source, size, other, TAG))
        source, target = source + size, target + size
    while requests:
        requests = [r for r in requests if channel.finished(r) is None]
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main(sys.argv[1])
