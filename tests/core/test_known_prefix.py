"""Blocks that the destination of a move has in its prefix cache are not sent."""

from mellmpi.protocol import KvReserved, SendKv
from tests.core.stage import Stage, told


def test_the_source_is_told_to_send_only_what_the_destination_does_not_know():
    stage = Stage()
    record = stage.reserving(num_prompt=15)
    assert record.offer.start == 0
    commands = stage.tell(2, KvReserved(7, record.offer.epoch, 8))
    assert [order.start for order in told(commands, SendKv)] == [8]
