"""Messages and KV blocks between workers, and the news that one is lost.

Knows neither requests nor policies. `mpi` is the room of MPI; `local` is a transport within one
process.
"""

from mellmpi.transport.base import Arena, Transfer, Transport
from mellmpi.transport.endpoint import Endpoint, Wakes
from mellmpi.transport.local import LocalNetwork
from mellmpi.transport.post import FAULT, USAGE, PeerFailed, Post

__all__ = [
    "FAULT",
    "USAGE",
    "Arena",
    "Endpoint",
    "LocalNetwork",
    "PeerFailed",
    "Post",
    "Transfer",
    "Transport",
    "Wakes",
]
