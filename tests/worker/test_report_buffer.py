"""Reports of a worker, and when there is none."""

from mellmpi.worker import Sequence
from mellmpi.worker.report_buffer import ReportBuffer
from tests.scheduler.stage import request


def test_a_preemption_alone_is_news():
    reports = ReportBuffer()
    reports.report(0, 0.0, free_bytes=10, acked=1)
    reports.preempted(Sequence(request(7), 3, [], []))
    assert reports.report(0, 0.0, free_bytes=10, acked=1).preempted == ((7, 3),)
    assert reports.report(0, 0.0, free_bytes=10, acked=1) is None


def test_prefilled_positions_attend_to_all_before_them_and_decodes_do_not_count():
    reports = ReportBuffer()
    reports.computed(start=10, num_positions=4, sampled=False)  # 10 + 11 + 12 + 13
    reports.computed(start=2, num_positions=3, sampled=True)  # 2 + 3, then a decode
    reports.computed(start=50, num_positions=1, sampled=True)
    report = reports.report(1, 0.1, free_bytes=10, acked=1)
    assert (report.attended, report.prefill_tokens, report.decode_tokens) == (51, 6, 2)
