"""Copies to and from a simulated GPU, which executes its queue when the test calls `work`."""

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mellmpi.transport.blocks import CudaCopies, Staged, staging_buffer_for
from tests.transport.participant import HostArena

SIZE = 4096


class Tensor:
    """Memory; copies to it are queued on the current stream."""

    def __init__(self, gpu, memory, pinned=False):
        self.gpu, self.memory, self.pinned, self.shape = gpu, memory, pinned, memory.shape

    def __getitem__(self, index):
        return Tensor(self.gpu, self.memory[index])

    def data_ptr(self):
        return self.memory.ctypes.data

    def copy_(self, source, non_blocking=False):
        assert non_blocking and self.gpu.current is not None, "the copy would wait for the step"
        assert self.pinned != source.pinned, "copies of pageable memory are synchronous"
        self.gpu.queue.append(lambda: np.copyto(self.memory, source.memory))


class Event:
    def __init__(self, gpu):
        self.gpu, self.reached = gpu, False

    def record(self, stream):
        assert stream is self.gpu.current
        self.gpu.queue.append(lambda: setattr(self, "reached", True))

    def query(self):
        return self.reached


class Gpu:
    def __init__(self, arena):
        self.queue, self.current, self.arena = [], None, arena

    def work(self, num_operations):
        for _ in range(min(num_operations, len(self.queue))):
            self.queue.pop(0)()

    def torch(self):
        @contextlib.contextmanager
        def stream(selected):
            self.current = selected
            yield
            self.current = None

        def empty(num_bytes, dtype, pin_memory):
            return Tensor(self, np.zeros(num_bytes, np.uint8), pin_memory)

        def as_tensor(blocks, device):
            interface = blocks.__cuda_array_interface__
            assert interface["data"] == (self.arena.address, False)
            assert interface["shape"] == self.arena.blocks.shape and interface["typestr"] == "|u1"
            return Tensor(self, self.arena.blocks)

        cuda = SimpleNamespace(
            stream=stream, Stream=lambda device: object(), Event=lambda: Event(self)
        )
        return SimpleNamespace(cuda=cuda, empty=empty, as_tensor=as_tensor, uint8=np.uint8)


@pytest.fixture
def gpu(monkeypatch):
    arena = HostArena(8, SIZE)
    arena.device = "cuda:0"
    gpu = Gpu(arena)
    monkeypatch.setitem(sys.modules, "torch", gpu.torch())
    return gpu


@pytest.fixture
def copies(gpu):
    return CudaCopies(gpu.arena)


def test_a_block_is_in_host_memory_when_its_copy_is_done(gpu, copies):
    gpu.arena.fill(5)
    addresses = [copies.new_slot() for _ in range(2)]
    for block, address in enumerate(addresses):
        copies.to_host(block, address)
    assert [copies.done(a) for a in addresses] == [False, False]
    gpu.work(1)
    assert not copies.done(addresses[0])  # copied, but the event is not recorded yet
    gpu.work(1)
    assert [copies.done(a) for a in addresses] == [True, False]
    slots = {address: copies._slots[address].memory for address in addresses}
    assert (slots[addresses[0]] == gpu.arena.blocks[0]).all()


def test_a_slot_is_done_after_the_last_of_its_copies(gpu, copies):
    address = copies.new_slot()
    assert copies.done(address)
    copies.to_host(0, address)
    gpu.work(2)
    copies.to_device(3, address)
    assert not copies.done(address)
    gpu.work(2)
    assert copies.done(address) and (gpu.arena.blocks[3] == gpu.arena.blocks[0]).all()


def test_slots_never_share_memory(gpu, copies):
    assert len({copies.new_slot() for _ in range(20)}) == 20


def test_device_memory_is_staged_unless_mpi_is_proven_to_take_it(gpu):
    staging = staging_buffer_for(gpu.arena, device_buffers=False)
    assert isinstance(staging, Staged) and staging.block_bytes == SIZE and not staging.can_be_read


def test_blocks_are_unchanged_after_a_round_trip_through_few_slots(gpu, copies):
    gpu.arena.fill(9)
    expected = gpu.arena.blocks[:4].copy()
    staging = Staged(SIZE, copies)
    for pair in ((0, 1), (2, 3)):
        addresses = [staging.send_address(block) for block in pair]
        gpu.work(100)
        for block, address in zip(pair, addresses, strict=True):
            assert staging.copy_done(address)
            staging.received(address, 4 + block)
        assert not any(staging.copy_done(address) for address in addresses)
        gpu.work(100)
        for address in addresses:
            staging.release(address)
    assert (gpu.arena.blocks[4:] == expected).all() and len(copies._slots) == 2
