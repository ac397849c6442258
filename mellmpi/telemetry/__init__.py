"""Figures, series and pictures of what happened.

Knows only events: it is told, and never asked.
"""

from mellmpi.telemetry.metrics import Metrics
from mellmpi.telemetry.timeline import SUFFIXES, draw

__all__ = [
    "SUFFIXES",
    "Metrics",
    "draw",
]
