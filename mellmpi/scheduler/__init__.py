"""The state machine of rank 0: events in, commands out.

Decides which worker holds which request, when requests move, and which workers park. Pure: knows no
clock, no MPI, no torch and no file.
"""

from mellmpi.scheduler.cluster import ClusterScheduler
from mellmpi.scheduler.ledger import Ledger, WorkerState
from mellmpi.scheduler.planner import RECOMPUTE, InFlight, Plan
from mellmpi.scheduler.requests import Log
from mellmpi.scheduler.view import MoveProposal, RequestColumns, View
from mellmpi.scheduler.workers import Commands, WorkerRegistry

__all__ = [
    "RECOMPUTE",
    "ClusterScheduler",
    "Commands",
    "InFlight",
    "Ledger",
    "Log",
    "MoveProposal",
    "Plan",
    "RequestColumns",
    "View",
    "WorkerRegistry",
    "WorkerState",
]
