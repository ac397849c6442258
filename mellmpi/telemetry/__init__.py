"""Figures, time series and traces of a run, computed from (time, event) pairs.

Knows only the protocol's events: no clock, no scheduler, no worker. Decides nothing.
"""

from mellmpi.telemetry.metrics import Metrics
from mellmpi.telemetry.observers import Observer, Observers
from mellmpi.telemetry.recent import Recent
from mellmpi.telemetry.trace import Trace

__all__ = ["Metrics", "Observer", "Observers", "Recent", "Trace"]
