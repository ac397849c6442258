"""Figures and time series of a run, computed from (time, event) pairs.

Knows only the protocol's events: no clock, no scheduler, no worker. Decides nothing.
"""

from mellmpi.telemetry.metrics import Metrics

__all__ = ["Metrics"]
