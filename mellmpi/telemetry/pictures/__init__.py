"""Pictures of a run, drawn from its time series.

A room of its own, imported only where a picture is wanted: matplotlib is slow to import.
"""

from mellmpi.telemetry.pictures.figure import SUFFIXES, draw
from mellmpi.telemetry.pictures.style import INK, KV_EDGE, KV_FILL, MUTED, RULE, hide_frame

__all__ = ["INK", "KV_EDGE", "KV_FILL", "MUTED", "RULE", "SUFFIXES", "draw", "hide_frame"]
