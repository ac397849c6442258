"""Cluster scheduler and batch schedulers on simulated time: many workers, no model, no MPI.

Knows nothing of real ranks. Contains the command `simulate`.
"""

from mellmpi.sim.bound import Load, make_load
from mellmpi.sim.command import simulate
from mellmpi.sim.executor import SilentExecutor
from mellmpi.sim.network import Network
from mellmpi.sim.options import SimulateOptions
from mellmpi.sim.profiles import MODELS
from mellmpi.sim.replay import NO_COST, IdealReplay, Settings
from mellmpi.sim.simulator import Simulation
from mellmpi.sim.worker import SimWorker, WorkerSpec

__all__ = [
    "MODELS",
    "NO_COST",
    "IdealReplay",
    "Load",
    "Network",
    "Settings",
    "SilentExecutor",
    "SimWorker",
    "SimulateOptions",
    "Simulation",
    "WorkerSpec",
    "make_load",
    "simulate",
]
