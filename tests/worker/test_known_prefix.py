"""Blocks that the destination of a move has in its prefix cache are not sent."""

from mellmpi.protocol import SCHEDULER, KvRefused, KvReserved, SendKv
from tests.scheduler.stage import Stage, told
from tests.worker.test_batch import Bench


def test_the_source_is_told_to_send_only_what_the_destination_does_not_know():
    stage = Stage()
    record = stage.reserving(num_prompt=15)
    assert record.offer.start == 0
    commands = stage.tell(2, KvReserved(7, record.offer.epoch, 8))
    assert [order.start for order in told(commands, SendKv)] == [8]


def test_who_refuses_a_move_gives_back_the_known_blocks_that_it_would_have_begun_with():
    bench = Bench(num_blocks=8, prefix=True)
    bench.assign(1, num_prompt=9, max_tokens=1)
    bench.step()
    assert bench.receive(num_prompt=40) == [(SCHEDULER, KvRefused(7, 2))]
    assert bench.batch.free_bytes == 80
    assert bench.receive(epoch=3, num_prompt=10) == [(SCHEDULER, KvReserved(7, 3, 8))]
