"""Measured and predicted durations: steps, links, migrations; and the lengths of answers.

Pure functions and tables of measurements; reads no clock and touches no device. Used by the
scheduler, the worker, the simulator and the calibration of a worker.
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
