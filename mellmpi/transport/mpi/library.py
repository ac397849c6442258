"""Initializes MPI with the settings that this project needs. No other module imports mpi4py."""

import faulthandler
import os

import mpi4py

from mellmpi.transport.mpi.starting import watch_start

mpi4py.rc.thread_level = "serialized"  # threads call MPI one at a time, see `MpiLock`
mpi4py.rc.finalize = False  # MpiJob.finish does it: after a fault it would block the exit
# Over TCP, Open MPI 5.0.11 emulates remote writes ("put"). Receives from a dead worker then stay
# in a list that it traverses later: in 9 of 22 jobs this crashed a surviving rank (in
# recv_request_process_pending), without "put" in none of 14. 313 is the default without "put".
os.environ.setdefault("OMPI_MCA_btl_tcp_flags", "313")

# If a rank never starts, the others wait in MPI_Init forever. Only this timer can end them there.
START_LIMIT_S = 120.0
faulthandler.dump_traceback_later(START_LIMIT_S, exit=True)
os.environ.setdefault("HOME", os.path.expanduser("~"))  # Open MPI needs it to start
_started = watch_start()
from mpi4py import MPI  # noqa: E402

_started()
faulthandler.cancel_dump_traceback_later()

__all__ = ["MPI"]
