"""`python -m mellmpi` on a CPU whose steps take as long as a GPU's.

Workers that share two cores slow each other, which no cost model of one worker knows. Here each
step is stretched to seconds given first: STEP_S + PREFILL_S a prefilled and DECODE_S a decoded
position. All else is the real thing.

    mpirun -n 5 python bench/paced.py STEP_S PREFILL_S DECODE_S run-batch --replay TRACE …
"""

import sys
import time
from typing import Any

from mellmpi.cli import main
from mellmpi.engine import executor
from mellmpi.protocol import StepPlan


def pace(step_s: float, prefill_s: float, decode_s: float) -> None:
    """Let every step of this process take so long, or longer if it computes longer."""
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
