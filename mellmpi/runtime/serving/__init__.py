"""Rank 0's half of the HTTP server: API server processes, the log of calls, shutdown.

Knows no HTTP: API servers turn it into messages. Decides nothing about requests.
"""

from mellmpi.runtime.serving.door import Door, open_door, say
from mellmpi.runtime.serving.front import HttpFront
from mellmpi.runtime.serving.progress import Progress

__all__ = ["Door", "HttpFront", "Progress", "open_door", "say"]
