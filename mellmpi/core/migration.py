"""How a request moves: its KV is sent, or computed again from its tokens."""

from mellmpi.core.cost import CostModel


def cheaper_mode(num_tokens: int, num_bytes: int, cost: CostModel) -> str:
    """ "transfer" or "recompute", whichever is estimated to take less time."""
    recompute = cost.recompute_s(num_tokens) < cost.transfer_s(num_bytes)
    return "recompute" if recompute else "transfer"
