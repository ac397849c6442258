"""Fields of a body that name tokens: stops, biases, allowed tokens."""

from typing import Any

from mellmpi.frontend.fields import BadRequest, Fields
from mellmpi.frontend.tokenizer import Tokenizer

MAX_STOPS = 4
MAX_NAMED = 1024  # tokens in logit_bias or allowed_token_ids


def stops_of(fields: Fields, tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return (stop strings, ids of stop tokens). A stop string that spells a special token becomes
    its id, because answers do not contain the text of special tokens."""
    stop = fields.get("stop", (str, list))
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS or not all(isinstance(text, str) and text for text in stops):
        raise BadRequest(f"stop must be one to {MAX_STOPS} strings that are not empty", "stop")
    ids = {text: tokenizer.special_id(clean(text, "stop").strip()) for text in stops}
    for text in (text for text, token in ids.items() if token is None):
        if inside := tokenizer.special_inside(text):
            raise BadRequest(
                f"stop contains the special token {inside}, whose text no answer contains: "
                "give that token alone",
                "stop",
            )
    return (
        tuple(text for text in stops if ids[text] is None),
        tuple(token for token in ids.values() if token is not None),
    )


def stop_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    return _ids(fields, "stop_token_ids", vocab_size)


def allowed_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """Return the only tokens that may come; empty: all may. An empty list is refused."""
    ids = _ids(fields, "allowed_token_ids", vocab_size)
    if fields.get("allowed_token_ids", list) == []:
        raise BadRequest("allowed_token_ids must not be empty", "allowed_token_ids")
    return tuple(dict.fromkeys(ids))


def _ids(fields: Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    ids = fields.get(name, list) or []
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise BadRequest(f"{name} must be token ids of the model", name)
    return tuple(ids)


def logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Return (token id, bias) pairs. The keys of the field are ids as text, as in OpenAI's API."""
    biases = fields.get("logit_bias", dict) or {}
    if len(biases) > MAX_NAMED:
        raise BadRequest(f"logit_bias may have at most {MAX_NAMED} tokens", "logit_bias")
    return tuple((_id(key, vocab_size), _bias(value)) for key, value in biases.items())


def _id(key: Any, vocab_size: int) -> int:
    is_canonical = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10
    if not is_canonical or str(int(key)) != key or int(key) >= vocab_size:
        raise BadRequest("the keys of logit_bias must be token ids of the model", "logit_bias")
    return int(key)


def _bias(value: Any) -> float:
    if type(value) not in (int, float) or not -100 <= value <= 100:  # or NaN
        raise BadRequest("the values of logit_bias must be numbers from -100 to 100", "logit_bias")
    return float(value)


def clean(text: str, where: str) -> str:
    """Refuse lone surrogates, which JSON can escape, but which are not characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{where} has a lone surrogate, which is not valid text", where) from error
    return text
