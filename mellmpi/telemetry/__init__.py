"""Figures, time series and pictures of a run, computed from (time, event) pairs.

Knows only the protocol's events: no clock, no scheduler, no worker. Decides nothing.
"""

from mellmpi.telemetry.metrics import Metrics
from mellmpi.telemetry.timeline import SUFFIXES, draw

__all__ = [
    "SUFFIXES",
    "Metrics",
    "draw",
]
