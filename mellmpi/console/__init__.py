"""A running server, seen and operated from another terminal: `top`, `drain`, `migrate` …

Speaks HTTP only. Knows neither MPI nor torch, and nothing of the server but its `/v1/cluster`.
"""

from mellmpi.console.commands import operate

__all__ = ["operate"]
