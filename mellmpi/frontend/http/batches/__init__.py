"""Files and batches of clients (OpenAI's /v1/files and /v1/batches) on a disk.

A batch is run by one API server at a time, with the code of `run-batch`, and continued by another
one if that server dies. Knows a directory, and the link to rank 0; neither sockets nor the
scheduler.
"""

from mellmpi.frontend.http.batches.routes import add_batches
from mellmpi.frontend.http.batches.watch import BatchWatch

__all__ = ["BatchWatch", "add_batches"]
