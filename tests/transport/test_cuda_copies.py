"""Copies to and from a GPU, with a torch whose device works only when the test lets it."""

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mellmpi.transport.blocks import CudaCopies, Staged, lane_for
from tests.transport.conformance import HostArena

SIZE = 4096


class Tensor:
    """A piece of memory; copies to it are orders to the stream of the moment."""

    def __init__(self, gpu, memory, pinned=False):
        self.gpu, self.memory, self.pinned, self.shape = gpu, memory, pinned, memory.shape

    def __getitem__(self, index):
        return Tensor(self.gpu, self.memory[index])

    def data_ptr(self):
        return self.memory.ctypes.data

    def copy_(self, source, non_blocking=False):
        assert non_blocking and self.gpu.current is not None, "the step's stream would wait"
        assert self.pinned != source.pinned, "pageable memory is copied while the caller waits"
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
    """Its queue is carried out by `work`."""

    def __init__(self, arena):
        self.queue, self.current, self.arena = [], None, arena

    def work(self, orders):
        for _ in range(min(orders, len(self.queue))):
            self.queue.pop(0)()

    def torch(self):
        @contextlib.contextmanager
        def stream(which):
            self.current = which
            yield
            self.current = None

        def empty(num_bytes, dtype, pin_memory):
            return Tensor(self, np.zeros(num_bytes, np.uint8), pin_memory)

        def as_tensor(blocks, device):
            facts = blocks.__cuda_array_interface__
            assert facts["data"] == (self.arena.address, False)
            assert facts["shape"] == self.arena.blocks.shape and facts["typestr"] == "|u1"
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


def test_a_block_has_arrived_in_host_memory_once_its_copy_is_done_and_not_before(gpu, copies):
    gpu.arena.fill(5)
    addresses = [copies.host_slot() for _ in range(2)]
    for block, address in enumerate(addresses):
        copies.out(block, address)
    assert [copies.done(a) for a in addresses] == [False, False]
    gpu.work(1)
    assert not copies.done(addresses[0])  # the copy is over, nobody has said so yet
    gpu.work(1)
    assert [copies.done(a) for a in addresses] == [True, False]
    slots = {address: copies._slots[address].memory for address in addresses}
    assert (slots[addresses[0]] == gpu.arena.blocks[0]).all()


def test_a_slot_is_still_after_the_last_of_its_copies(gpu, copies):
    address = copies.host_slot()
    assert copies.done(address)
    copies.out(0, address)
    gpu.work(2)
    copies.into(3, address)
    assert not copies.done(address)
    gpu.work(2)
    assert copies.done(address) and (gpu.arena.blocks[3] == gpu.arena.blocks[0]).all()


def test_the_memory_of_a_slot_lives_as_long_as_its_address_is_used(gpu, copies):
    assert len({copies.host_slot() for _ in range(20)}) == 20


def test_device_memory_travels_through_pinned_memory_where_mpi_was_not_proven(gpu):
    lane = lane_for(gpu.arena, device_buffers=False)
    assert isinstance(lane, Staged) and lane.block_bytes == SIZE and not lane.can_be_read


def test_many_blocks_go_through_few_slots_and_back_unchanged(gpu, copies):
    gpu.arena.fill(9)
    expected = gpu.arena.blocks[:4].copy()
    lane = Staged(SIZE, copies)
    for pair in ((0, 1), (2, 3)):
        addresses = [lane.outgoing(block) for block in pair]
        gpu.work(100)
        for block, address in zip(pair, addresses, strict=True):
            assert lane.still(address)
            lane.arrived(address, 4 + block)
        assert not any(lane.still(address) for address in addresses)
        gpu.work(100)
        for address in addresses:
            lane.free(address)
    assert (gpu.arena.blocks[4:] == expected).all() and len(copies._slots) == 2
