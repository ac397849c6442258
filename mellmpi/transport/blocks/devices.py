"""Blocks in device memory: staged through pinned host memory, unless MPI is proven to take them.

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

# Set by the launcher of this job; the environment of another job must not contain them.
LAUNCHER_VARIABLES = ("OMPI_COMM_", "OMPI_MCA_orte", "PMIX_", "PRTE_", "PMI_", "SLURM_")
FAR = {"OMPI_MCA_btl": "tcp,self"}  # read by Open MPI only, and not by UCX


class Copies(Protocol):
    """Asynchronous copies between one arena and slots: host memory for one block each."""

    def new_slot(self) -> int:
        """Allocate a slot that lives as long as this object. Returns its address."""
        ...

    def to_host(self, block_id: int, address: int) -> None: ...
    def to_device(self, block_id: int, address: int) -> None: ...
    def done(self, address: int) -> bool:
        """The last copy from or to this slot is complete."""
        ...


class Staged:
    """A StagingBuffer of slots in host memory: some blocks are copied while others are sent.

    Each transfer takes new slots where none is free, at most a window of them. So two workers that
    send to each other cannot deadlock.
    """

    in_host_memory = True
    can_be_read = False  # slots are reused within a transfer

    def __init__(self, block_bytes: int, copies: Copies):
        self.block_bytes = block_bytes
        self.send_window = window(block_bytes)
        self._copies = copies
        self._free: list[int] = []

    def send_address(self, block_id: int) -> int:
        address = self.receive_address(block_id)
        self._copies.to_host(block_id, address)
        return address

    def receive_address(self, block_id: int) -> int:
        return self._free.pop() if self._free else self._copies.new_slot()

    def copy_done(self, address: int) -> bool:
        return self._copies.done(address)

    def received(self, address: int, block_id: int) -> None:
        self._copies.to_device(block_id, address)

    def release(self, address: int) -> None:
        self._free.append(address)


class DeviceArena:
    """Blocks in the memory of a GPU, for probes; `device` as torch names it ("cuda:1")."""

    def __init__(self, num_blocks: int, block_bytes: int, device: str):
        import torch

        self.blocks = torch.ones((num_blocks, block_bytes), dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        self.num_blocks, self.block_bytes, self.device = num_blocks, block_bytes, device
        self.address = int(self.blocks.data_ptr())


class _ArenaView:
    """CUDA array interface of an arena: uint8 [num_blocks, block_bytes], not copied."""

    def __init__(self, arena: Arena):
        self.__cuda_array_interface__ = {
            "shape": (arena.num_blocks, arena.block_bytes),
            "typestr": "|u1",
            "data": (arena.address, False),
            "version": 3,
        }


class CudaCopies:
    """Copies through pinned memory on a separate CUDA stream, in parallel to the current step.

    No synchronization with steps is needed: blocks are sent after the steps that write them and
    received before the steps that read them, and a step ends when its tokens are on the host.
    """

    def __init__(self, arena: Arena):
        import torch

        self._torch: Any = torch
        self._blocks = torch.as_tensor(_ArenaView(arena), device=arena.device)
        self._stream = self._torch.cuda.Stream(device=arena.device)
        self._slots: dict[int, Any] = {}
        self._events: dict[int, Any] = {}  # of the last copy from or to each slot

    def new_slot(self) -> int:
        slot = self._torch.empty(self._blocks.shape[1], dtype=self._torch.uint8, pin_memory=True)
        self._slots[slot.data_ptr()] = slot
        return int(slot.data_ptr())

    def to_host(self, block_id: int, address: int) -> None:
        self._copy(self._slots[address], self._blocks[block_id], address)

    def to_device(self, block_id: int, address: int) -> None:
        self._copy(self._blocks[block_id], self._slots[address], address)

    def _copy(self, target: Any, source: Any, address: int) -> None:
        with self._torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = self._events[address] = self._torch.cuda.Event()
            event.record(self._stream)

    def done(self, address: int) -> bool:
        return address not in self._events or bool(self._events[address].query())


def staging_buffer_for(arena: Arena, device_buffers: bool) -> StagingBuffer:
    """The staging buffer of this arena; `device_buffers`: MPI is proven to take device memory."""
    if str(arena.device) == "cpu" or device_buffers:  # may be a torch.device
        return InPlace(arena)
    return Staged(arena.block_bytes, CudaCopies(arena))


def device_buffers_work(
    device: str, mpirun: Sequence[str] | None = None, limit_s: float = 60, far: bool = False
) -> bool:
    """Returns whether MPI correctly moves messages between buffers of this device and the next.

    No build flag tells, and MPI crashes or hangs where it cannot. So two other processes try it.
    They inherit our environment, and with it the messaging layer that this job was told to use.

    mpirun  the command line that starts them; None: mpirun of this environment
    far     as between two hosts, without what Open MPI can do only within one
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
        job.terminate()  # mpirun ends its ranks, which are in separate sessions
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
