"""The samples of `Metrics` in the text formats of Prometheus.

A room of its own, imported only where `/metrics` is served; prometheus-client only here. Knows no
events: samples are plain data, and may come from another process.
"""

from mellmpi.telemetry.prometheus.families import COUNTER, FAMILIES, GAUGE, Family
from mellmpi.telemetry.prometheus.render import render

__all__ = ["COUNTER", "FAMILIES", "GAUGE", "Family", "render"]
