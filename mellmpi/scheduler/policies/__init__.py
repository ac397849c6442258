"""Placement and migration policies: pairs of functions of a view, chosen by name.

Pure: a policy knows the view of the cluster and nothing else, and returns proposals; the scheduler
checks them and carries them out. A policy of several files has a room of its own.
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
    """The named policy as `--migrate never|auto|stress` wants it."""
    if name not in POLICIES:
        raise ValueError(f"--policy must be one of {', '.join(POLICIES)}, not {name}")
    policy = POLICIES[name]
    warm_up()  # or the first request would wait for it
    if name == "mell":
        mell.warm_up()
    if migrate == "never":
        return without_moves(policy)
    return Policy(policy.place, stress.rebalance) if migrate == "stress" else policy
