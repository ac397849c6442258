"""Pictures of a run, drawn from its time series.

A room of its own, imported only where a picture is wanted: matplotlib is slow to import.
"""

from mellmpi.telemetry.pictures.figure import SUFFIXES, draw

__all__ = ["SUFFIXES", "draw"]
