"""Scenarios of messages, see `conformance`."""

import random
import time
from dataclasses import replace

from mellmpi.protocol import GREEDY, Cancel, KvReserved, Request, Submit
from tests.transport.participant import LIMIT_S, Participant


def _request(id: int, num_tokens: int) -> Request:
    rng = random.Random(id)
    prompt = tuple(rng.randrange(50_000) for _ in range(num_tokens))
    sampling = replace(GREEDY, seed=2**64 - 1)
    return Request(id, "model", prompt, sampling, None, 0, None)


def messages_of_a_link_arrive_in_order(participant: Participant) -> None:
    t = participant.transport
    everyone = range(t.num_workers + 1)
    for i in range(300):
        for dst in everyone:
            if dst != t.worker:
                t.send(dst, KvReserved(i, t.worker, 0))
    for src in everyone:
        if src != t.worker:
            got = [participant.next(src) for _ in range(300)]
            assert got == [KvReserved(i, src, 0) for i in range(300)]


def big_messages_arrive_complete_and_in_order(participant: Participant) -> None:
    t = participant.transport
    if t.worker == 1:
        for i in range(4):
            t.send(2, Cancel(i, "gone"))
            t.send(2, Submit(_request(i, 100_000)))
        t.send(2, Cancel(4, "gone"))
    if t.worker == 2:
        for i in range(4):
            assert participant.next(1) == Cancel(i, "gone")
            assert participant.next(1) == Submit(_request(i, 100_000))
        assert participant.next(1) == Cancel(4, "gone")


def many_may_send_to_one_at_once(participant: Participant) -> None:
    t = participant.transport
    if t.worker != 0:
        for i in range(1000):
            t.send(0, Cancel(i, "gone"))
        return
    for src in range(1, t.num_workers + 1):
        assert [participant.next(src) for _ in range(1000)] == [
            Cancel(i, "gone") for i in range(1000)
        ]


def all_may_send_before_any_receives(participant: Participant) -> None:
    """With blocking sends this would deadlock."""
    t = participant.transport
    others = [w for w in range(t.num_workers + 1) if w != t.worker]
    big = _request(t.worker, 100_000)
    for dst in others * 5:
        t.send(dst, Submit(big))
    for src in others:
        expected = Submit(_request(src, 100_000))
        assert all(participant.next(src) == expected for _ in range(5))


def wake_ends_a_wait_that_comes_after_it(participant: Participant) -> None:
    started_s = time.monotonic()
    for _ in range(3):
        participant.transport.wake()
        participant.transport.wait(LIMIT_S)
    assert time.monotonic() - started_s < LIMIT_S
