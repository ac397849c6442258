"""Which worker owns a request, and what its steps produced."""

from mellmpi.protocol.request import Request, TokenLogprob
from mellmpi.protocol.wire import message


@message
class Assign:
    """Scheduler → worker: own this request. First placement, resume, recompute, recovery alike."""

    request: Request
    epoch: int
    outputs: tuple[int, ...]  # tokens already produced, from the log


@message
class Release:
    """Scheduler → worker: forget this assignment and free its blocks."""

    request_id: int
    epoch: int


@message
class StepReport:
    """Worker → scheduler: what the steps since the last report produced and freed.

    Runs are flat: run i is `counts[i]` tokens of `request_ids[i]` under `epochs[i]`, the first of
    them at output index `firsts[i]`; `tokens` holds the runs one after the other.
    """

    steps: int
    step_s: float  # wall time of the steps, the loop around them included, seconds
    prefill_tokens: int  # computed positions that were not sampled from
    decode_tokens: int  # sampled positions
    free_bytes: int  # of the KV arena, now
    acked: int  # commands handled so far
    request_ids: tuple[int, ...]
    epochs: tuple[int, ...]
    firsts: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[int, tuple[TokenLogprob, ...]], ...]  # (run index, one a token), sparse
    preempted: tuple[tuple[int, int], ...]  # (request id, epoch): handed back, blocks freed
    attended: int  # positions that the prefilled ones looked back on, one by one
