"""What is measured, and what is predicted from it: steps, links, migrations, answer lengths.

Pure: knows no clock and no machine, only numbers that others have measured. Used by both state
machines, the simulator and the worker's calibration.
"""

from mellmpi.costs.answer_lengths import MEMORY, AnswerLengths
from mellmpi.costs.cost_model import CostModel
from mellmpi.costs.estimates import Estimates
from mellmpi.costs.links import Link, Links
from mellmpi.costs.migration_overhead import MigrationOverhead
from mellmpi.costs.step_budget import UNKNOWN, StepBudget, StepSeconds, chunk_s
from mellmpi.costs.step_times import ATTENDED, StepTimes

__all__ = [
    "ATTENDED",
    "MEMORY",
    "UNKNOWN",
    "AnswerLengths",
    "CostModel",
    "Estimates",
    "Link",
    "Links",
    "MigrationOverhead",
    "StepBudget",
    "StepSeconds",
    "StepTimes",
    "chunk_s",
]
