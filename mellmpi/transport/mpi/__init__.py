"""MPI: its start, one communicator as a channel, the end of a job.

Only this folder imports MPI. Knows neither the contents of messages nor requests.
"""

from mellmpi.transport.mpi.channel import MpiChannel
from mellmpi.transport.mpi.job import MixedInstallation, MpiJob
from mellmpi.transport.mpi.library import MPI
from mellmpi.transport.mpi.yielding import set_yielding

__all__ = [
    "MPI",
    "MixedInstallation",
    "MpiChannel",
    "MpiJob",
    "set_yielding",
]
