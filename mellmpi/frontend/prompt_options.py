"""Fields about the prompt of a call: `echo`, `prompt_logprobs`, and `max_tokens` beside them.

As in vLLM, of which `prompt_logprobs` is a field.
"""

from dataclasses import dataclass
from typing import Any

from mellmpi.frontend.fields import BadRequest, Fields

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, OpenAI's value; a chat may fill the context
MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Parts of an answer that are about its prompt."""

    echo: bool  # the text of the prompt precedes that of the answer
    texts: tuple[str | None, ...]  # with `echo`: each prompt as given; None: given as tokens
    alone: bool  # with `echo`, max_tokens 0: no answer; the one token of a request is dropped
    num_logprobs: int | None  # alternatives a token in `prompt_logprobs`; None: no such field


def prompt_options(fields: Fields) -> PromptOptions:
    """Read and check the fields. Raises BadRequest."""
    num_logprobs = _num_logprobs(fields)
    if num_logprobs is not None and fields.boolean("stream"):
        raise BadRequest("prompt_logprobs cannot be streamed", "prompt_logprobs")
    echo = not fields.chat and fields.boolean("echo")
    texts = _texts(fields.get("prompt", (str, list))) if echo else ()
    alone = echo and fields.integer("max_tokens", None) == 0
    return PromptOptions(echo=echo, texts=texts, alone=alone, num_logprobs=num_logprobs)


def _texts(prompt: Any) -> tuple[str | None, ...]:
    """Return each prompt of a checked field `prompt`, or None if it is token ids."""
    one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return tuple(text if isinstance(text, str) else None for text in ([prompt] if one else prompt))


def _num_logprobs(fields: Fields) -> int | None:
    return fields.integer("prompt_logprobs", None, low=0, high=MAX_LOGPROBS)


def num_scored(fields: Fields, num_logprobs: int | None) -> int | None:
    """Return the alternatives that a worker reports for each token of a prompt; None: no logprobs.

    num_logprobs  the same for tokens of the answer
    """
    echoed = num_logprobs if not fields.chat and fields.boolean("echo") else None
    asked = [n for n in (echoed, _num_logprobs(fields)) if n is not None]
    return max(asked, default=None)


def max_tokens(fields: Fields, prompt_len: int, max_model_len: int) -> int:
    """Return the most tokens that a worker samples: at least 1. Raises BadRequest."""
    least = 0 if not fields.chat and fields.boolean("echo") else 1
    name, asked = "max_tokens", fields.integer("max_tokens", None, low=least)
    if fields.chat and (newer := fields.integer("max_completion_tokens", None, low=1)) is not None:
        name, asked = "max_completion_tokens", newer
    left, limit = max_model_len - prompt_len, max_model_len
    param = "messages" if fields.chat else "prompt"
    if left < (asked != 0):
        raise BadRequest(
            f"this model's context is {limit} tokens, and the prompt alone has {prompt_len}; "
            "at least one must be left for the answer",
            param,
            "context_length_exceeded",
        )
    if asked is None:
        return left if fields.chat else min(DEFAULT_MAX_TOKENS, left)
    if asked > left:
        raise BadRequest(
            f"this model's context is {limit} tokens, but {prompt_len + asked} were asked for: "
            f"{prompt_len} in the prompt and {name} {asked}",
            param,
            "context_length_exceeded",
        )
    return max(1, asked)
