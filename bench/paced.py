"""Runs `python -m mellmpi` on a CPU with the step times of a GPU.

Workers that share cores slow each other down, which the cost model of one worker does not cover.
Here each step is extended to STEP_S + PREFILL_S per prefilled + DECODE_S per decoded position.
Everything else is unchanged.

    mpirun -n 5 python bench/paced.py STEP_S PREFILL_S DECODE_S run-batch --replay TRACE …
"""

import sys
import time
from typing import Any

from mellmpi.cli import main
from mellmpi.engine import executor
from mellmpi.protocol import StepPlan


def pace(step_s: float, prefill_s: float, decode_s: float) -> None:
    """Extend every step of this process to the modelled time, in seconds."""
    compute = executor.Executor.execute

    def paced(self: Any, plan: StepPlan) -> Any:
        began_s = time.perf_counter()
        result = compute(self, plan)
        decoded = sum(chunk.sampling is not None for chunk in plan.chunks)
        prefilled = sum(len(chunk.tokens) for chunk in plan.chunks) - decoded
        end_s = began_s + step_s + prefilled * prefill_s + decoded * decode_s
        time.sleep(max(0.0, end_s - time.perf_counter()))
        return result

    executor.Executor.execute = paced  # type: ignore[method-assign]


if __name__ == "__main__":
    pace(*map(float, sys.argv[1:4]))
    sys.exit(main(sys.argv[4:]))
