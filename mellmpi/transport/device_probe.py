"""Two ranks that pass a device buffer on and compare it: see `devices.device_buffers_work`."""

import sys

import torch
from mpi4py import MPI


def main(device: str) -> None:
    sent = (torch.arange(100_000, dtype=torch.int32) * 7).to(device)  # contiguous, not eager
    got = torch.zeros_like(sent)
    if sent.is_cuda:
        torch.cuda.synchronize()
    comm = MPI.COMM_WORLD
    request = comm.Isend(sent, 1 - comm.rank)
    comm.Recv(got, 1 - comm.rank)
    request.Wait()
    if sent.is_cuda:
        torch.cuda.synchronize()
    right = comm.allreduce(bool(torch.equal(sent.cpu(), got.cpu())), MPI.LAND)
    if not right:
        raise SystemExit("the values differ")
    if comm.rank == 0:
        sys.stdout.write("device buffers work\n")


if __name__ == "__main__":
    main(sys.argv[1])
