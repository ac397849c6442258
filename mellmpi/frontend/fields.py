"""Reads the fields of an OpenAI body: checks types and ranges, refuses unsupported fields."""

import difflib
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

Default = TypeVar("Default", int, None)

SHARED = (
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "prompt_logprobs",
    "stream",
    "stream_options",
    "return_token_ids",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "priority",
    "deadline_s",
)
CHAT_ONLY = (
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "add_generation_prompt",
    "chat_template_kwargs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
)
COMPLETIONS_ONLY = ("prompt", "echo")
IGNORED = (  # bookkeeping of the client; no influence on the answer
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
)
# Fields of OpenAI or vLLM that are not supported: a request with one of them is refused. With each
# field, the values that have no effect and are accepted (null always is).
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "beam_width": (1,),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}


class BadRequest(Exception):
    """An error of the client. Becomes an OpenAI error with this HTTP status."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: tuple[tuple[str, str], ...] = (),
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.headers = headers  # of the HTTP response

    @property
    def error(self) -> dict[str, Any]:
        """The value of "error" in the body of the response."""
        kinds = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
            500: "internal_error",
            503: "overloaded_error",
        }
        kind = kinds.get(self.status, "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


def check_names(
    body: Mapping[str, Any],
    known: tuple[str, ...],
    ignored: tuple[str, ...],
    unsupported: Mapping[str, tuple[Any, ...]],
) -> None:
    """Refuse unknown fields, and unsupported ones with a value that would change the answer."""
    for name, value in body.items():
        if name in known or name in ignored or value is None:
            continue
        if name not in unsupported:
            message = f"unknown field {_short_repr(name)}{_suggestion(name, known)}"
            raise BadRequest(message, shortened(name))
        if not any(_same(value, accepted) for accepted in unsupported[name]):
            raise BadRequest(f"{name} is not supported here; leave it out", name, "unsupported")


def _same(value: Any, other: Any) -> bool:
    """Whether values are equal to a client, to whom false is not 0."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


class Fields:
    """The fields of one body. A field that is absent or null has its default.

    All methods raise BadRequest for invalid values.
    """

    def __init__(self, body: Mapping[str, Any], *, chat: bool):
        self._body, self.chat = body, chat

    def check_names(self) -> None:
        """Refuse unknown fields, and unsupported ones that would change the answer."""
        known = (*SHARED, *(CHAT_ONLY if self.chat else COMPLETIONS_ONLY))
        check_names(self._body, known, IGNORED, UNSUPPORTED)

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Return the value, which is of type `kind`, or None."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(_TYPE_NAMES[kind] for kind in kinds)
            raise BadRequest(f"{name} must be {wanted}, not {_short_repr(value)}", name)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.get(name, bool)
        return default if value is None else value

    def integer(
        self, name: str, default: Default, low: int | None = None, high: int | None = None
    ) -> int | Default:
        value = self._body.get(name)
        if value is None:
            return default
        if type(value) is not int:  # bool is an int to Python, but not to a client
            raise BadRequest(f"{name} must be an integer, not {_short_repr(value)}", name)
        if (low is not None and value < low) or (high is not None and value > high):
            raise BadRequest(f"{name} must be {_range(low, high)}, not {_short_repr(value)}", name)
        return value

    def number(
        self,
        name: str,
        default: float,
        low: float,
        high: float | None = None,
        *,
        low_open: bool = False,
    ) -> float:
        value = self._body.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not abs(value) < sys.float_info.max:  # or NaN
            raise BadRequest(f"{name} must be a number, not {_short_repr(value)}", name)
        if value < low or (low_open and value == low) or (high is not None and value > high):
            wanted = _range(low, high, low_open=low_open)
            raise BadRequest(f"{name} must be {wanted}, not {_short_repr(value)}", name)
        return float(value)


_TYPE_NAMES = {str: "text", list: "a list", dict: "an object", bool: "true or false"}


def _short_repr(value: Any) -> str:
    return shortened(repr(value))


def shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _range(low: float | None, high: float | None, *, low_open: bool = False) -> str:
    above = f"over {low:g}" if low_open else f"at least {low}"
    return above if high is None else f"{above} and at most {high}"


def _suggestion(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
