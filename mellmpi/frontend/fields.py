"""Fields of an OpenAI body: read with their types checked, refused where we cannot honour them."""

import difflib
import sys
from collections.abc import Mapping
from typing import Any

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
    "stream",
    "stream_options",
    "return_token_ids",
)
OF_CHAT = (
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "add_generation_prompt",
    "chat_template_kwargs",
)
OF_COMPLETIONS = ("prompt",)
IGNORED = (  # bookkeeping of the client's, without influence on the answer
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "request_id",
)
# Known, but not to be had here: whoever asks for one must hear of it. With each, the value that
# asks for nothing (null always does).
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
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
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}


class BadRequest(Exception):
    """The client's fault: becomes an OpenAI error with this status."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    @property
    def error(self) -> dict[str, Any]:
        """What stands under "error" in the body of the answer."""
        kinds = {404: "not_found_error", 500: "internal_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


class Fields:
    """The fields of one body. A field that is absent or null has its default."""

    def __init__(self, body: Mapping[str, Any], *, chat: bool):
        self._body, self.chat = body, chat

    def check_names(self) -> None:
        """Refuse fields that we do not know, and known ones that we would have to ignore."""
        known = (*SHARED, *(OF_CHAT if self.chat else OF_COMPLETIONS))
        for name, value in self._body.items():
            if name in known or name in IGNORED or value is None:
                continue
            if name not in UNSUPPORTED:
                raise BadRequest(f"unknown field {_shown(name)}{_meant(name, known)}", _short(name))
            if value not in UNSUPPORTED[name]:
                raise BadRequest(f"{name} is not supported here; leave it out", name, "unsupported")

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """The value, or None; never of another type than `kind`."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(_NAMES[kind] for kind in kinds)
            raise BadRequest(f"{name} must be {wanted}, not {_shown(value)}", name)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.get(name, bool)
        return default if value is None else value

    def integer(
        self, name: str, default: int | None, low: int | None = None, high: int | None = None
    ) -> Any:
        value = self._body.get(name)
        if value is None:
            return default
        if type(value) is not int:  # bool is an int to Python, but not to a client
            raise BadRequest(f"{name} must be an integer, not {_shown(value)}", name)
        if (low is not None and value < low) or (high is not None and value > high):
            raise BadRequest(f"{name} must be {_range(low, high)}, not {_shown(value)}", name)
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
        if type(value) not in (int, float) or not abs(value) < sys.float_info.max:  # NaN neither
            raise BadRequest(f"{name} must be a number, not {_shown(value)}", name)
        if value < low or (low_open and value == low) or (high is not None and value > high):
            wanted = _range(low, high, low_open=low_open)
            raise BadRequest(f"{name} must be {wanted}, not {_shown(value)}", name)
        return float(value)


_NAMES = {str: "text", list: "a list", dict: "an object", bool: "true or false"}


def _shown(value: Any) -> str:
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _range(low: float | None, high: float | None, *, low_open: bool = False) -> str:
    above = f"over {low:g}" if low_open else f"at least {low}"
    return above if high is None else f"{above} and at most {high}"


def _meant(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
