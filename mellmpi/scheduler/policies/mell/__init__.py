"""The policy `mell`: the online algorithm of the MELL paper (arXiv 2501.06709, section VI).

A pure function of the view of the cluster; returns proposals. Knows no output length in advance.
"""

from mellmpi.scheduler.policies.mell.policy import place, rebalance, warm_up

__all__ = [
    "place",
    "rebalance",
    "warm_up",
]
