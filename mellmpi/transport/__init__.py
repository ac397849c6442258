"""Messages and KV blocks between workers, and the detection of lost workers.

Knows neither requests nor policies. The folder `mpi` holds everything that calls MPI; `local` is a
transport within one process.
"""

from mellmpi.transport.base import Arena, Transfer, Transport
from mellmpi.transport.control_plane import FAULT, USAGE, ControlPlane, PeerFailed
from mellmpi.transport.endpoint import Endpoint, WaitPolicy
from mellmpi.transport.local import LocalNetwork

__all__ = [
    "FAULT",
    "USAGE",
    "Arena",
    "ControlPlane",
    "Endpoint",
    "LocalNetwork",
    "PeerFailed",
    "Transfer",
    "Transport",
    "WaitPolicy",
]
