"""Requests of clients, and the messages between the front and the scheduler about them."""

from collections.abc import Sequence
from typing import Final

from mellmpi.protocol.wire import message


@message
class Sampling:
    """Sampling parameters of a request, all fixed when the request is made."""

    max_tokens: int  # at least 1
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    repetition_penalty: float  # 1: off; over prompt and output
    presence_penalty: float  # 0: off; over output
    frequency_penalty: float  # 0: off; over output
    seed: int  # 0 … 2**64 - 1; with the position, the only source of randomness
    stop_token_ids: tuple[int, ...]  # each of them ends the output and is its last token
    num_logprobs: int | None  # alternatives to report a token; None: no logprobs at all
    num_prompt_logprobs: int | None  # the same for the tokens of the prompt
    min_tokens: int  # no stop token before the output has so many tokens
    logit_bias: tuple[tuple[int, float], ...]  # (token id, -100 … 100): added to its logit
    allowed_token_ids: tuple[int, ...]  # the only ones that may come; empty: all may
    grammar: str  # of the output, in llguidance's format, with at least one stop token; "": none


GREEDY: Final = Sampling(
    max_tokens=1,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    seed=0,
    stop_token_ids=(),
    num_logprobs=None,
    num_prompt_logprobs=None,
    min_tokens=0,
    logit_bias=(),
    allowed_token_ids=(),
    grammar="",
)
"""One token, the likeliest. For other lengths: `dataclasses.replace(GREEDY, max_tokens=…)`."""


@message
class Request:
    """A client's request; immutable, and all that a worker needs to compute the answer."""

    id: int
    model: str
    prompt: tuple[int, ...]  # token ids, at least one
    sampling: Sampling
    adapter: str | None
    priority: int  # lower: placed sooner; first in, first out among equals
    deadline_s: float | None  # after its Submit, for the whole answer; None: no deadline


TokenLogprob = tuple[float, tuple[int, ...], tuple[float, ...]]
"""(logprob of the token, ids of the likeliest tokens, their logprobs); natural logarithms."""

PromptLogprob = tuple[TokenLogprob, int]
"""(logprobs of a token of the prompt, its rank in the vocabulary: 1 is the likeliest)."""


@message
class Submit:
    """Front → scheduler: serve this request."""

    request: Request


@message
class Cancel:
    """Front → scheduler: no more tokens of this request are needed."""

    request_id: int
    reason: str  # "stop": a stop string completed the answer; "gone": the client left


@message
class Emit:
    """Scheduler → front: new tokens of a request, in order, each exactly once."""

    request_id: int
    first: int  # index of the first of these tokens in the output
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # one a token, or empty
    finish_reason: str | None  # "stop" or "length" with the last tokens
    prompt_logprobs: tuple[PromptLogprob, ...]  # with `first` 0: one a token from the second on


@message
class Rejected:
    """Scheduler → front: this request ends without a complete answer.

    It could never be served here, or not soon enough, or its deadline has passed. Tokens may have
    been emitted before.
    """

    request_id: int
    reason: str
    retry_after_s: float  # when the same request would be accepted, as predicted; 0: never


def finish_reason(request: Request, outputs: Sequence[int]) -> str | None:
    """Return "stop" or "length" if the output is complete, else None.

    A pure function of request and tokens: all ranks agree on the result without a message.
    """
    if outputs and outputs[-1] in request.sampling.stop_token_ids:
        return "stop"
    return "length" if len(outputs) >= request.sampling.max_tokens else None
