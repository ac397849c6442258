"""MPI: how it starts, one communicator as a channel, how a job ends.

The only room that imports MPI, and the only one that knows ranks.
"""

from mellmpi.transport.mpi.channel import MpiChannel
from mellmpi.transport.mpi.job import MixedInstallation, MpiJob
from mellmpi.transport.mpi.launcher import end_launcher
from mellmpi.transport.mpi.library import MPI
from mellmpi.transport.mpi.yielding import set_yielding

__all__ = [
    "MPI",
    "MixedInstallation",
    "MpiChannel",
    "MpiJob",
    "end_launcher",
    "set_yielding",
]
