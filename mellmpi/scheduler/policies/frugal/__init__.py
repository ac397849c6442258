"""The policy `frugal`: few workers, few bytes moved.

Knows the view of the cluster; returns proposals.
"""

from mellmpi.scheduler.policies.frugal.policy import place, rebalance

__all__ = [
    "place",
    "rebalance",
]
