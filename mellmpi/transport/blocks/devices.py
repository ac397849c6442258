"""Blocks in device memory: staged through pinned host memory, unless MPI proves it can do better.

Torch is imported only where there is a device.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, Protocol

from mellmpi.transport.base import Arena
from mellmpi.transport.blocks.staging import InPlace, StagingBuffer, window

# What a process inherits from the launcher of its job, and a job of its own must not see.
LAUNCHER_VARIABLES = ("OMPI_COMM_", "OMPI_MCA_orte", "PMIX_", "PRTE_", "PMI_", "SLURM_")
FAR = {"OMPI_MCA_btl": "tcp,self"}  # nothing but Open MPI asks for it, and UCX does not


class Copies(Protocol):
    """Copies between one arena and host memory, begun by the call and done later."""

    def host_slot(self) -> int:
        """Address of fresh host memory for one block, kept as long as this object."""
        ...

    def out(self, block_id: int, address: int) -> None: ...
    def into(self, block_id: int, address: int) -> None: ...
    def done(self, address: int) -> bool:
        """The last copy from or to this slot."""
        ...


class Staged:
    """A lane through host memory: some blocks are copied while others are sent.

    Each transfer holds at most a window of slots, so that two workers that send to each other can
    never wait for each other's.
    """

    in_host_memory = True
    can_be_read = False  # slots come and go

    def __init__(self, block_bytes: int, copies: Copies):
        self.block_bytes = block_bytes
        self.send_window = window(block_bytes)
        self._copies = copies
        self._free: list[int] = []

    def outgoing(self, block_id: int) -> int:
        address = self.incoming(block_id)
        self._copies.out(block_id, address)
        return address

    def incoming(self, block_id: int) -> int:
        return self._free.pop() if self._free else self._copies.host_slot()

    def still(self, address: int) -> bool:
        return self._copies.done(address)

    def arrived(self, address: int, block_id: int) -> None:
        self._copies.into(block_id, address)

    def free(self, address: int) -> None:
        self._free.append(address)


class DeviceArena:
    """Blocks in the memory of a GPU, for probes; `device` in torch's words."""

    def __init__(self, num_blocks: int, block_bytes: int, device: str):
        import torch

        self.blocks = torch.ones((num_blocks, block_bytes), dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        self.num_blocks, self.block_bytes, self.device = num_blocks, block_bytes, device
        self.address = int(self.blocks.data_ptr())


class _Blocks:
    """An arena as torch sees it: [num_blocks, block_bytes] bytes, not copied."""

    def __init__(self, arena: Arena):
        self.__cuda_array_interface__ = {
            "shape": (arena.num_blocks, arena.block_bytes),
            "typestr": "|u1",
            "data": (arena.address, False),
            "version": 3,
        }


class CudaCopies:
    """Through pinned memory, on a stream of its own: no copy waits for the step under way.

    Nor need it: blocks are sent after, and used before, the steps that touch them, and a step ends
    with its tokens on the host.
    """

    def __init__(self, arena: Arena):
        import torch

        self._torch: Any = torch
        self._blocks = torch.as_tensor(_Blocks(arena), device=arena.device)
        self._stream = self._torch.cuda.Stream(device=arena.device)
        self._slots: dict[int, Any] = {}
        self._events: dict[int, Any] = {}  # of the last copy from or to each slot

    def host_slot(self) -> int:
        slot = self._torch.empty(self._blocks.shape[1], dtype=self._torch.uint8, pin_memory=True)
        self._slots[slot.data_ptr()] = slot
        return int(slot.data_ptr())

    def out(self, block_id: int, address: int) -> None:
        self._copy(self._slots[address], self._blocks[block_id], address)

    def into(self, block_id: int, address: int) -> None:
        self._copy(self._blocks[block_id], self._slots[address], address)

    def _copy(self, to: Any, source: Any, address: int) -> None:
        with self._torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            event = self._events[address] = self._torch.cuda.Event()
            event.record(self._stream)

    def done(self, address: int) -> bool:
        return address not in self._events or bool(self._events[address].query())


def lane_for(arena: Arena, device_buffers: bool) -> StagingBuffer:
    """How blocks of this arena travel; `device_buffers`: MPI takes device memory (proven)."""
    if str(arena.device) == "cpu" or device_buffers:  # torch gives a device, not its name
        return InPlace(arena)
    return Staged(arena.block_bytes, CudaCopies(arena))


def device_buffers_work(
    device: str, mpirun: Sequence[str] | None = None, limit_s: float = 60, far: bool = False
) -> bool:
    """Does MPI move messages between buffers of this device, or of it and the next, correctly?

    Tried in a throwaway pair of processes, started by this `mpirun` command line: where it does
    not work it crashes or hangs. No build flag tells. The pair has our environment, and with it the
    messaging layer that this job was told to use. `far`: as between two hosts, without what Open
    MPI can do only within one.
    """
    command = mpirun or _mpirun()
    if not command:
        return False
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    environment |= FAR if far else {}
    probe = [
        *command,
        "-n",
        "2",
        sys.executable,
        "-m",
        "mellmpi.transport.probes.device_buffers",
        device,
    ]
    try:
        job = subprocess.Popen(probe, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    except OSError:
        return False
    try:
        output, _ = job.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        job.terminate()  # mpirun takes its ranks along; they are in sessions of their own
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(5)
        job.kill()
        job.wait()
        return False
    return job.returncode == 0 and b"device buffers work" in output


def _mpirun() -> list[str]:
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    flags = ("--allow-run-as-root", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none")
    return [found, *flags] if found else []
