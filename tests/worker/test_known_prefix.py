"""Blocks that the destination of a migration has in its prefix cache are not sent."""

from mellmpi.protocol import SCHEDULER, KvRefused, KvReserved, SendKv
from tests.scheduler.stage import Stage, of_type
from tests.worker.test_batch import Bench


def test_the_source_sends_only_blocks_that_the_destination_does_not_have():
    stage = Stage()
    record = stage.reserving(num_prompt=15)
    assert record.offer.start == 0
    commands = stage.handle(2, KvReserved(7, record.offer.epoch, 8))
    assert [order.start for order in of_type(commands, SendKv)] == [8]


def test_a_destination_that_refuses_frees_the_cached_blocks_of_the_prefix():
    bench = Bench(num_blocks=8, prefix=True)
    bench.assign(1, num_prompt=9, max_tokens=1)
    bench.step()
    assert bench.receive(num_prompt=40) == [(SCHEDULER, KvRefused(7, 2))]
    assert bench.batch.free_bytes == 80
    assert bench.receive(epoch=3, num_prompt=10) == [(SCHEDULER, KvReserved(7, 3, 8))]
