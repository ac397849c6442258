"""When a server says that its workers make no progress."""

from dataclasses import replace

from mellmpi.protocol import StepReport
from mellmpi.runtime.serving.progress import STALLED_S, Progress

REPORT = StepReport(1, 0.1, 0, 0, 0, 0, (), (), (), (), (), (), (), 0, (), ())


def test_requests_without_steps_are_a_problem_until_the_next_step():
    progress = Progress()
    assert progress.problem(0.0, 3) == ""
    assert progress.problem(STALLED_S - 0.1, 3) == ""
    assert "no worker has computed a step for 30 s; 3 requests" in progress.problem(STALLED_S, 3)
    progress.observe(40.0, 1, replace(REPORT, steps=0))
    assert progress.problem(41.0, 3)
    progress.observe(41.0, 1, REPORT)
    assert progress.problem(42.0, 3) == ""


def test_an_idle_server_has_no_problem():
    progress = Progress()
    progress.observe(0.0, 1, REPORT)
    assert progress.problem(1000.0, 0) == ""
    assert progress.problem(1001.0, 1) == ""
    assert progress.problem(1001.0 + STALLED_S, 1)
