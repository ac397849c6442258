"""KV that requests free by finishing, as expected from rates and mean lengths. Pure."""

import numpy as np

from mellmpi.scheduler.view import View


def freed_in(view: View, seconds: float, able: np.ndarray) -> float:
    """Bytes that requests on active workers in `able` free by finishing, less growth of others.

    able  bool [workers + 1]

    held · f - growth · seconds · (1 - f), where f = seconds · token_rate / answer_tokens, at most
    1, is the share of requests that finish.
    """
    workers = view.workers
    active = able & view.active()
    ending = min(1.0, seconds * view.token_rate / max(view.answer_tokens, 1.0))
    held = (workers.capacity - workers.budget)[active].sum()
    grown = seconds * view.growth_Bps[active].sum()
    return float(ending * held - (1 - ending) * grown)
