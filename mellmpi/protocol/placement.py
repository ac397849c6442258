"""Messages about the ownership of a request and the results of a worker's steps."""

from mellmpi.protocol.request import PromptLogprob, Request, TokenLogprob
from mellmpi.protocol.wire import message


@message
class Assign:
    """Scheduler → worker: own this request.

    The same message for first placement, resumption, recompute migration and recovery.
    """

    request: Request
    epoch: int
    outputs: tuple[int, ...]  # output tokens in the scheduler's log


@message
class Release:
    """Scheduler → worker: end this assignment and free its blocks."""

    request_id: int
    epoch: int


@message
class StepReport:
    """Worker → scheduler: results of the steps since the last report.

    Runs are flat: run i is `counts[i]` tokens of `request_ids[i]` under `epochs[i]`, the first of
    them at output index `firsts[i]`; `tokens` is the concatenation of all runs.
    """

    steps: int
    step_s: float  # wall time of the steps, including the loop around them, seconds
    prefill_tokens: int  # computed positions without sampling
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
    attended: int  # (query, key) pairs: earlier positions that prefilled positions attended to
    cached: tuple[tuple[int, int], ...]  # (request id, prompt tokens found in the prefix cache) of
    #                                      requests placed here without outputs; () if it is off
    prompt_logprobs: tuple[tuple[int, tuple[PromptLogprob, ...]], ...]  # (run index, of the whole
    # prompt), sparse: with the run that begins at output 0
