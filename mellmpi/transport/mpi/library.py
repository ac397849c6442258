"""The MPI library, started as this project needs it. The only module that imports `mpi4py.MPI`."""

import faulthandler
import os

import mpi4py

from mellmpi.transport.mpi.starting import watch_start

mpi4py.rc.thread_level = "serialized"  # one thread at a time calls MPI, see `MpiLock`
mpi4py.rc.finalize = False  # by MpiJob.finish alone: after a fault it would hang the exit
# Over TCP, Open MPI 5.0.11's emulated remote writes leave receives from a dead worker in a list
# that it walks later: 9 of 22 jobs lost a survivor so (in recv_request_process_pending), none of 14
# without them. The number is the default of its TCP layer less "put".
os.environ.setdefault("OMPI_MCA_btl_tcp_flags", "313")

# A rank that never starts would keep the others in MPI_Init for ever.
# Nothing but this timer can end a process there.
START_LIMIT_S = 120.0
faulthandler.dump_traceback_later(START_LIMIT_S, exit=True)
os.environ.setdefault("HOME", os.path.expanduser("~"))  # Open MPI does not start without it
_started = watch_start()
from mpi4py import MPI  # noqa: E402

_started()
faulthandler.cancel_dump_traceback_later()

__all__ = ["MPI"]
