"""A worker's state machine: which tokens a step computes, and which blocks move.

Pure: knows no tensor, no MPI and no other worker but by number. The engine computes what it plans,
the transport moves what it orders.
"""

from mellmpi.worker.batch import BatchScheduler
from mellmpi.worker.sequences import Sequence

__all__ = [
    "BatchScheduler",
    "Sequence",
]
