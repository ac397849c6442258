import os
import threading
import time

import pytest

from mellmpi.transport.blocks import ProgressThread
from mellmpi.transport.blocks.cross_memory import SHORT_PIECE_BYTES
from mellmpi.transport.blocks.framing import TransferHeader
from mellmpi.transport.blocks.progress_thread import AWAY_S, LONGEST_REST_S
from mellmpi.transport.blocks.staging import InPlace
from tests.transport.conformance import LIMIT_S, HostArena
from tests.transport.fakes import FakeChannel

BLOCK_BYTES = 1000


class Endings:
    """Counts, and lets a test wait for, what a carrier tells."""

    def __init__(self):
        self.told = threading.Semaphore(0)

    def wait(self):
        assert self.told.acquire(timeout=LIMIT_S), "the carrier told nothing"


@pytest.fixture
def endings():
    return Endings()


@pytest.fixture
def channel():
    return FakeChannel(eager=1)  # answers leave at once


@pytest.fixture
def carrier(channel, endings):
    carrier = ProgressThread(channel, lambda _: False, ended=endings.told.release)
    carrier.attach(InPlace(HostArena(8, BLOCK_BYTES)))
    yield carrier
    carrier.close()
    assert not carrier._thread.is_alive()


def arrive(channel, num_blocks):
    data = [bytes([i + 1]) * BLOCK_BYTES for i in range(num_blocks)]
    channel.waiting[1, 5] += [bytes(TransferHeader(num_blocks, BLOCK_BYTES, False).pack()), *data]


def test_blocks_arrive_though_the_main_thread_only_waits(carrier, channel, endings):
    transfer = carrier.receive(1, 5, range(8))
    arrive(channel, 8)
    endings.wait()
    assert transfer.done and not transfer.failed and transfer.num_bytes == 8 * BLOCK_BYTES


def test_a_main_thread_that_waits_anyway_carries_itself(carrier, channel):
    transfer = carrier.receive(1, 5, range(8))
    arrive(channel, 8)
    stop_s = time.monotonic() + LIMIT_S
    while not transfer.done and time.monotonic() < stop_s:
        carrier.progress()
    assert transfer.done and not carrier.busy


def test_a_thread_leaves_blocks_to_a_main_thread_that_attends(carrier, channel, endings):
    carrier.attend(True)
    transfer = carrier.receive(1, 5, range(8))
    arrive(channel, 8)
    assert not endings.told.acquire(timeout=0.05) and not transfer.done
    carrier.attend(False)
    endings.wait()
    assert transfer.done


def test_a_thread_rests_longer_each_time_it_finds_the_main_one_here(carrier, monkeypatch):
    rests = []
    monkeypatch.setattr(carrier._asked, "wait", rests.append)
    rest_s = AWAY_S
    for _ in range(8):
        rest_s = carrier._rest(rest_s)
    assert rests == [min(AWAY_S * 2**i, LONGEST_REST_S) for i in range(8)]


def test_a_main_thread_that_leaves_ends_a_long_rest(carrier):
    carrier._resting = True
    carrier.attend(True)
    assert not carrier._asked.is_set()
    carrier._asked.wait = lambda _: carrier.attend(False) or carrier._asked.is_set()
    assert carrier._rest(LONGEST_REST_S) == AWAY_S


def test_a_main_thread_that_moves_blocks_is_here_however_long_that_takes(carrier):
    carrier._looked_s = -AWAY_S
    assert not carrier._is_main_here()
    with carrier._driving:
        assert carrier._is_main_here()


def offer(channel, arena):
    """All blocks of this arena, to be read."""
    ids = range(arena.num_blocks)
    addresses = tuple(arena.address + i * BLOCK_BYTES for i in ids)
    opening = TransferHeader(len(ids), BLOCK_BYTES, False, os.getpid(), addresses)
    channel.waiting[1, 5].append(bytes(opening.pack()))


def test_a_main_thread_that_attends_reads_in_short_pieces(carrier, channel, monkeypatch):
    there, called = HostArena(8, BLOCK_BYTES), []
    carry_out = carrier._reads.carry_out

    def noted(most_bytes):
        called.append((threading.current_thread() is threading.main_thread(), most_bytes))
        return carry_out(most_bytes)

    monkeypatch.setattr(carrier._reads, "carry_out", noted)
    carrier.attend(True)
    carrier.receive(1, 5, range(8))
    offer(channel, there)
    carrier.progress()
    assert (True, SHORT_PIECE_BYTES) in called


@pytest.mark.parametrize("attends", [True, False])
def test_a_main_thread_that_attends_reads_on_and_one_between_steps_a_piece(
    carrier, channel, monkeypatch, attends
):
    called = []
    monkeypatch.setattr(
        carrier._reads, "carry_out", lambda _: not called.append(0) and len(called) < 4
    )
    monkeypatch.setattr(carrier._asked, "set", lambda: None)  # the thread sleeps on
    carrier.attend(attends)
    carrier.receive(1, 5, range(8))
    offer(channel, HostArena(8, BLOCK_BYTES))
    monkeypatch.setattr("mellmpi.transport.blocks.progress_thread.BURST_S", LIMIT_S)
    carrier.progress()
    assert len(called) == (4 if attends else 1)


def test_the_thread_reads_while_the_main_one_attends_and_tells_it(carrier, channel, endings):
    there = HostArena(8, BLOCK_BYTES)
    carrier.attend(True)
    carrier.receive(1, 5, range(8))
    offer(channel, there)
    with carrier._driving:  # as if the main thread were busy with one piece
        carrier._round(carrier._moves)
        carrier._asked.set()
        endings.wait()
    assert not carrier._reads


def test_the_arena_may_go_once_all_has_ended_and_not_before(carrier, channel, endings):
    transfer = carrier.receive(1, 5, range(8))
    with pytest.raises(AssertionError, match="under way"):
        carrier.attach(None)
    arrive(channel, 8)
    endings.wait()
    assert transfer.done
    carrier.attach(None)


def test_transfers_with_a_lost_peer_end(carrier, channel, endings):
    transfer = carrier.receive(1, 5, range(8))
    channel.lost.add(1)
    carrier.forget(1)
    stop_s = time.monotonic() + LIMIT_S
    while not transfer.done and time.monotonic() < stop_s:
        time.sleep(0)
    assert transfer.reason == "peer lost"


def test_closing_ends_what_is_under_way(channel, endings):
    carrier = ProgressThread(channel, lambda _: False, ended=endings.told.release)
    carrier.attach(InPlace(HostArena(8, BLOCK_BYTES)))
    transfer = carrier.receive(1, 5, range(8))
    carrier.close()
    assert transfer.done and transfer.failed


def test_a_bug_in_the_thread_is_raised_in_the_main_one(channel, endings):
    carrier = ProgressThread(channel, lambda _: False, ended=endings.told.release)
    carrier.attach(InPlace(HostArena(8, BLOCK_BYTES)))

    def match(src, tag):
        if threading.current_thread() is not threading.main_thread():
            raise TypeError("a bug")

    channel.match = match
    carrier.receive(1, 5, range(8))
    endings.wait()
    with pytest.raises(TypeError, match="a bug"):
        carrier.progress()
    carrier.close()


def test_what_was_asked_for_while_the_thread_drove_is_done_at_the_end(channel, endings):
    carrier = ProgressThread(channel, lambda _: False, ended=endings.told.release)
    carrier.attach(InPlace(HostArena(8, BLOCK_BYTES)))
    with carrier._driving:
        transfer = carrier.receive(1, 5, range(8))
        carrier._closing = True
    carrier.close()
    assert transfer.done and transfer.failed
