"""The policy `frugal`: few workers, few bytes moved.

A pure function of the view of the cluster; returns proposals. Knows no output length in advance.
"""

from mellmpi.scheduler.policies.frugal.policy import place, rebalance

__all__ = [
    "place",
    "rebalance",
]
