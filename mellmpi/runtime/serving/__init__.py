"""Rank 0's half of the HTTP server: API server processes, the log of calls, shutdown.

Knows no HTTP: API servers turn it into messages. Decides nothing about requests.
"""

from mellmpi.runtime.serving.serve import Door, ServingRank0, open_door

__all__ = ["Door", "ServingRank0", "open_door"]
