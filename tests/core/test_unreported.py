"""What a worker has to say, and when it has nothing."""

from mellmpi.core.sequences import Sequence
from mellmpi.core.unreported import Unreported
from tests.core.stage import request


def test_a_preemption_alone_is_news():
    unreported = Unreported()
    unreported.report(0, 0.0, free_bytes=10, acked=1)
    unreported.preempted(Sequence(request(7), 3, [], []))
    assert unreported.report(0, 0.0, free_bytes=10, acked=1).preempted == ((7, 3),)
    assert unreported.report(0, 0.0, free_bytes=10, acked=1) is None
