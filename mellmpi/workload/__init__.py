"""Workloads: arrival times and lengths from public trace formats, or from a seeded generator.

Knows no prompt text and no policy: a workload has one row per request, with times in seconds and
lengths in tokens.
"""

from mellmpi.workload.requests import Workload, gamma
from mellmpi.workload.rows import open_filled
from mellmpi.workload.trace import load

__all__ = ["Workload", "gamma", "load", "open_filled"]
