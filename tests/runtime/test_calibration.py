"""The steps that a worker measures at its start give the coefficients of all its steps."""

import pytest

from mellmpi.costs import ATTENDED
from mellmpi.protocol import HostedModel, ModelKv, StepResult
from mellmpi.runtime.calibration import measured_steps


class Engine:
    """Simulates step times; the first step of each shape takes three times as long."""

    models = (HostedModel(ModelKv("m", 16, 1024), "layout"),)

    def __init__(self, seconds):
        self.now, self.seconds, self.seen, self.farthest = 0.0, seconds, set(), 0

    def execute(self, plan):
        step_s, prefill_s, decode_s, attended_s = self.seconds
        took_s, sampled = step_s, 0
        for chunk in plan.chunks:
            n = len(chunk.tokens)
            self.farthest = max(self.farthest, chunk.start + n)
            assert len(chunk.block_table) * 16 >= chunk.start + n
            sampled += chunk.sampling is not None
            took_s += decode_s if chunk.sampling else n * (prefill_s + attended_s * chunk.start)
        shape = tuple((c.start, len(c.tokens)) for c in plan.chunks)
        self.now += took_s if shape in self.seen else 3 * took_s
        self.seen.add(shape)
        return StepResult((7,) * sampled, (None,) * sampled)


@pytest.mark.parametrize("seconds", [(0.01, 2e-3, 3e-3, 1e-6), (0.05, 2e-5, 1e-4, 1e-8)])
def test_the_four_coefficients_are_found(seconds):
    engine = Engine(seconds)
    assert measured_steps(engine, 8192, lambda: engine.now) == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize("most", [1, 2, 40, 300, 100_000])
def test_no_position_beyond_the_models_limit_is_used(most):
    engine = Engine((0.01, 1e-4, 1e-3, 1e-7))
    measured_steps(engine, most, lambda: engine.now)
    assert engine.farthest <= max(2, most)


def test_no_coefficient_is_negative():
    engine = Engine((0.01, 2e-3, 0.0, 0.0))
    step_s, prefill_s, decode_s, attended_s = measured_steps(engine, 8192, lambda: engine.now)
    assert min(step_s, prefill_s, decode_s) > 0 and attended_s == prefill_s / ATTENDED
