"""A worker's state machine: which tokens a step computes, and which blocks are transferred.

Pure: knows no tensor and no MPI; other workers are numbers. The engine runs the steps that it
plans, the transport carries out the block transfers that it orders.
"""

from mellmpi.worker.batch import BatchScheduler
from mellmpi.worker.messages import BatchCommand, BatchEvent, BlockResult, Outbox
from mellmpi.worker.sequences import Sequence

__all__ = [
    "BatchCommand",
    "BatchEvent",
    "BatchScheduler",
    "BlockResult",
    "Outbox",
    "Sequence",
]
