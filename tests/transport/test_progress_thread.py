import os
import threading
import time

import pytest

from mellmpi.transport.blocks import ProgressThread
from mellmpi.transport.blocks.cross_memory import SHORT_PIECE_BYTES
from mellmpi.transport.blocks.framing import TransferHeader
from mellmpi.transport.blocks.progress_thread import AWAY_S, LONGEST_REST_S
from mellmpi.transport.blocks.staging import InPlace
from tests.transport.fakes import FakeChannel
from tests.transport.participant import LIMIT_S, HostArena

BLOCK_BYTES = 1000


class Endings:
    """Counts the calls of `on_end`; a test can wait for the next one."""

    def __init__(self):
        self.calls = threading.Semaphore(0)

    def wait(self):
        assert self.calls.acquire(timeout=LIMIT_S), "on_end was not called"


@pytest.fixture
def endings():
    return Endings()


@pytest.fixture
def channel():
    return FakeChannel(eager=1)  # answers are sent at once


@pytest.fixture
def mover(channel, endings):
    mover = ProgressThread(channel, lambda _: False, on_end=endings.calls.release)
    mover.attach(InPlace(HostArena(8, BLOCK_BYTES)))
    yield mover
    mover.close()
    assert not mover._thread.is_alive()


def deliver(channel, num_blocks):
    data = [bytes([i + 1]) * BLOCK_BYTES for i in range(num_blocks)]
    channel.waiting[1, 5] += [bytes(TransferHeader(num_blocks, BLOCK_BYTES, False).pack()), *data]


def test_blocks_arrive_while_the_main_thread_does_nothing(mover, channel, endings):
    transfer = mover.receive(1, 5, range(8))
    deliver(channel, 8)
    endings.wait()
    assert transfer.done and not transfer.failed and transfer.num_bytes == 8 * BLOCK_BYTES


def test_a_main_thread_that_calls_progress_moves_the_blocks_itself(mover, channel):
    transfer = mover.receive(1, 5, range(8))
    deliver(channel, 8)
    stop_s = time.monotonic() + LIMIT_S
    while not transfer.done and time.monotonic() < stop_s:
        mover.progress()
    assert transfer.done and not mover.busy


def test_the_thread_leaves_blocks_to_a_main_thread_that_polls(mover, channel, endings):
    mover.set_polling(True)
    transfer = mover.receive(1, 5, range(8))
    deliver(channel, 8)
    assert not endings.calls.acquire(timeout=0.05) and not transfer.done
    mover.set_polling(False)
    endings.wait()
    assert transfer.done


def test_rests_get_longer_while_the_main_thread_is_active(mover, monkeypatch):
    rests = []
    monkeypatch.setattr(mover._wake, "wait", rests.append)
    rest_s = AWAY_S
    for _ in range(8):
        rest_s = mover._rest(rest_s)
    assert rests == [min(AWAY_S * 2**i, LONGEST_REST_S) for i in range(8)]


def test_a_main_thread_that_stops_polling_ends_a_long_rest(mover):
    mover._resting = True
    mover.set_polling(True)
    assert not mover._wake.is_set()
    mover._wake.wait = lambda _: mover.set_polling(False) or mover._wake.is_set()
    assert mover._rest(LONGEST_REST_S) == AWAY_S


def test_a_main_thread_that_moves_blocks_is_active_for_any_time(mover):
    mover._main_called_s = -AWAY_S
    assert not mover._is_main_active()
    with mover._driving:
        assert mover._is_main_active()


def deliver_header(channel, arena):
    """The header of a transfer of all blocks of this arena, to be read."""
    ids = range(arena.num_blocks)
    addresses = tuple(arena.address + i * BLOCK_BYTES for i in ids)
    header = TransferHeader(len(ids), BLOCK_BYTES, False, os.getpid(), addresses)
    channel.waiting[1, 5].append(bytes(header.pack()))


def test_a_main_thread_that_polls_reads_in_short_pieces(mover, channel, monkeypatch):
    source, called = HostArena(8, BLOCK_BYTES), []
    copy_piece = mover._reads.copy_piece

    def recorded(most_bytes):
        called.append((threading.current_thread() is threading.main_thread(), most_bytes))
        return copy_piece(most_bytes)

    monkeypatch.setattr(mover._reads, "copy_piece", recorded)
    mover.set_polling(True)
    mover.receive(1, 5, range(8))
    deliver_header(channel, source)
    mover.progress()
    assert (True, SHORT_PIECE_BYTES) in called


@pytest.mark.parametrize("polls", [True, False])
def test_a_main_thread_reads_one_piece_between_steps_and_more_while_it_polls(
    mover, channel, monkeypatch, polls
):
    called = []
    monkeypatch.setattr(
        mover._reads, "copy_piece", lambda _: not called.append(0) and len(called) < 4
    )
    monkeypatch.setattr(mover._wake, "set", lambda: None)  # the thread goes on sleeping
    mover.set_polling(polls)
    mover.receive(1, 5, range(8))
    deliver_header(channel, HostArena(8, BLOCK_BYTES))
    monkeypatch.setattr("mellmpi.transport.blocks.progress_thread.BURST_S", LIMIT_S)
    mover.progress()
    assert len(called) == (4 if polls else 1)


def test_the_thread_reads_while_the_main_thread_polls_and_calls_on_end(mover, channel, endings):
    source = HostArena(8, BLOCK_BYTES)
    mover.set_polling(True)
    mover.receive(1, 5, range(8))
    deliver_header(channel, source)
    with mover._driving:  # as if the main thread copied a piece
        mover._round(mover._transfers)
        mover._wake.set()
        endings.wait()
    assert not mover._reads


def test_the_arena_can_be_detached_only_after_all_transfers(mover, channel, endings):
    transfer = mover.receive(1, 5, range(8))
    with pytest.raises(AssertionError, match="in progress"):
        mover.attach(None)
    deliver(channel, 8)
    endings.wait()
    assert transfer.done
    mover.attach(None)


def test_transfers_with_a_lost_peer_end(mover, channel, endings):
    transfer = mover.receive(1, 5, range(8))
    channel.lost.add(1)
    mover.drop_peer(1)
    stop_s = time.monotonic() + LIMIT_S
    while not transfer.done and time.monotonic() < stop_s:
        time.sleep(0)
    assert transfer.reason == "peer lost"


def test_close_ends_transfers_in_progress(channel, endings):
    mover = ProgressThread(channel, lambda _: False, on_end=endings.calls.release)
    mover.attach(InPlace(HostArena(8, BLOCK_BYTES)))
    transfer = mover.receive(1, 5, range(8))
    mover.close()
    assert transfer.done and transfer.failed


def test_an_exception_in_the_thread_is_raised_in_the_main_thread(channel, endings):
    mover = ProgressThread(channel, lambda _: False, on_end=endings.calls.release)
    mover.attach(InPlace(HostArena(8, BLOCK_BYTES)))

    def match(src, tag):
        if threading.current_thread() is not threading.main_thread():
            raise TypeError("a bug")

    channel.match = match
    mover.receive(1, 5, range(8))
    endings.wait()
    with pytest.raises(TypeError, match="a bug"):
        mover.progress()
    mover.close()


def test_close_carries_out_orders_that_the_thread_has_not(channel, endings):
    mover = ProgressThread(channel, lambda _: False, on_end=endings.calls.release)
    mover.attach(InPlace(HostArena(8, BLOCK_BYTES)))
    with mover._driving:
        transfer = mover.receive(1, 5, range(8))
        mover._closing = True
    mover.close()
    assert transfer.done and transfer.failed
