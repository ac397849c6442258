"""The policy `mell`: the online algorithm of the MELL paper (arXiv 2501.06709, section VI).

Knows the view of the cluster; returns proposals.
"""

from mellmpi.scheduler.policies.mell.policy import place, rebalance, warm_up

__all__ = [
    "place",
    "rebalance",
    "warm_up",
]
