"""Fixtures of the tests of block transfers over a FakeChannel."""

import subprocess
import sys

import pytest

from mellmpi.transport.blocks import BlockMover
from mellmpi.transport.blocks.staging import InPlace
from tests.transport.block_messages import BLOCK_BYTES
from tests.transport.fakes import FakeChannel
from tests.transport.memory_areas import SMALL_BLOCK_BYTES
from tests.transport.participant import HostArena


@pytest.fixture
def channel():
    return FakeChannel(eager=1)  # answers are sent at once


@pytest.fixture
def arena():
    return HostArena(16, BLOCK_BYTES)


@pytest.fixture
def mover(channel, arena):
    mover = BlockMover(channel)
    mover.attach(InPlace(arena))
    yield mover
    mover.close()
    assert not mover.busy or channel.pending("send")
    assert all(request.done for request in channel.pending("receive"))  # canceled


@pytest.fixture
def dead_pid():
    """The id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.fixture
def source():
    """The arena of the sender."""
    arena = HostArena(16, SMALL_BLOCK_BYTES)
    arena.fill(3)
    return arena


@pytest.fixture
def target():
    return HostArena(16, SMALL_BLOCK_BYTES)
