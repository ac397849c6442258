"""Arrivals and lengths: public traces, recognised by their columns, and seeded generators.

Knows no prompt text and no policy: a workload is one row a request, times in seconds, lengths in
tokens.
"""

from mellmpi.workload.requests import Workload, gamma
from mellmpi.workload.rows import open_filled
from mellmpi.workload.trace import load

__all__ = ["Workload", "gamma", "load", "open_filled"]
