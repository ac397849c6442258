"""Placement and migration policies, chosen by name: pure functions of a view of the cluster.

A policy returns proposals; the scheduler checks them and carries them out. Policies know neither
commands nor messages nor clocks. A policy of several files has its own folder.
"""

from mellmpi.scheduler.policies import best_fit, frugal, load_balance, mell, stress, worst_fit
from mellmpi.scheduler.policies.base import Policy, without_moves
from mellmpi.scheduler.policies.kernels import warm_up

__all__ = ["POLICIES", "Policy", "policy_for"]

POLICIES = {
    "best_fit": Policy(best_fit.place, best_fit.rebalance, resumes_at_home=True),
    "worst_fit": Policy(worst_fit.place, worst_fit.rebalance, resumes_at_home=True),
    "load_balance": Policy(load_balance.place, load_balance.rebalance),
    "mell": Policy(mell.place, mell.rebalance),
    "frugal": Policy(frugal.place, frugal.rebalance),
}


def policy_for(name: str, migrate: str) -> Policy:
    """The policy for `--policy NAME --migrate never|auto|stress`, with its kernels compiled.

    Raises ValueError for an unknown name.
    """
    if name not in POLICIES:
        raise ValueError(f"--policy must be one of {', '.join(POLICIES)}, not {name}")
    policy = POLICIES[name]
    warm_up()
    if name == "mell":
        mell.warm_up()
    if migrate == "never":
        return without_moves(policy)
    return Policy(policy.place, stress.rebalance) if migrate == "stress" else policy
