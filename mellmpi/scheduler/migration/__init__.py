"""How a request changes its worker: which way, in what order, with what answers.

Knows the scheduler's records and the costs; not why a policy wants a request to move.
"""

from mellmpi.scheduler.migration.handover import Handover
from mellmpi.scheduler.migration.proposals import planned

__all__ = [
    "Handover",
    "planned",
]
