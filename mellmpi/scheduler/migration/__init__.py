"""How a request changes its worker: selection of the moves, and the handover protocol.

Knows the scheduler's records and the costs, but not why a policy wants a request to move.
"""

from mellmpi.scheduler.migration.handover import Handover
from mellmpi.scheduler.migration.proposals import planned

__all__ = ["Handover", "planned"]
