"""Structured output: the fields of a body as one grammar, tried before the request is accepted.

All fields become text in the format of llguidance, which the workers apply. What llguidance would
drop silently is refused, and so is a grammar that fails, that no answer can satisfy, or that takes
too long. A further source of grammars, such as tools, needs another function like `grammar_text`.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from threading import Thread
from typing import Any

from mellmpi.frontend.fields import BadRequest, Fields, shortened
from mellmpi.frontend.json_schema import check_schema
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.protocol import GRAMMAR_LIMITS

MAX_CHARACTERS = 256 << 10
TRIAL_S = 1.0  # longest trial of a grammar
TRIAL_TOKENS = 32  # computed in a trial: some regexes fail only after a while
PASSED = 64  # grammars that are not tried again
# At most so much at each place, or some models would write white space to the end.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
KINDS = ("json", "regex", "choice", "grammar")  # of guided_* and in structured_outputs
FIELDS = ("response_format", *(f"guided_{kind}" for kind in KINDS), "structured_outputs")
# An option of a rule, `name[temperature=0.5]: …`, which the sampler does not know.
TEMPERATURE = re.compile(r"""\[[^]"'/\n]*\btemperature\s*=""")


def grammar_text(fields: Fields) -> tuple[str, str]:
    """Return the grammar that the body asks for, and the name of its field; "" if none.

    Raises BadRequest for more than one grammar, and for values of a wrong form.
    """
    found = [pair for name in FIELDS for pair in _asked(name, fields)]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise BadRequest(f"only one of {names} can be used at once", found[1][0])
    if not found:
        return "", ""
    name, make = found[0]
    try:
        text = make()
    except (ValueError, RecursionError) as error:  # NaN in a schema, a lone surrogate
        raise BadRequest(f"{name} is not valid ({_short(str(error))})", name) from error
    if len(text) > MAX_CHARACTERS:
        message = f"{name} has a grammar of {len(text)} characters; {MAX_CHARACTERS} is the limit"
        raise BadRequest(message, name)
    return text, name


Made = tuple[str, Callable[[], str]]


def _asked(name: str, fields: Fields) -> list[Made]:
    """Return the field's name and a function that makes its grammar, or nothing."""
    if name == "response_format":
        return _response_format(fields.get(name, dict))
    if name == "structured_outputs":
        given = {k: v for k, v in (fields.get(name, dict) or {}).items() if v is not None}
        if unknown := given.keys() - set(KINDS) - {"json_object"}:
            raise BadRequest(f"{name}.{shortened(min(unknown))} is not supported", name)
        if not isinstance(given.get("json_object", True), bool):
            raise BadRequest(f"{name}.json_object must be true or false", name)
        if given.pop("json_object", False):
            return [(name, partial(_json_grammar, {"type": "object"}, name)), *_kinds(name, given)]
        return _kinds(name, given)
    value = fields.get(name, (dict, str, list))
    return [] if value is None else _kinds(name, {name.removeprefix("guided_"): value})


def _kinds(name: str, given: Mapping[str, Any]) -> list[Made]:
    return [(name, partial(MAKERS[kind], value, name)) for kind, value in given.items()]


def _response_format(value: dict[str, Any] | None) -> list[Made]:
    name = "response_format"
    match (value or {}).get("type", "text" if value is None else None):
        case "text":
            return []
        case "json_object":
            return [(name, partial(_json_grammar, {"type": "object"}, name))]
        case "json_schema":
            assert value is not None
            inner = value.get("json_schema")
            if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
                raise BadRequest(f"{name}.json_schema must be an object with a schema", name)
            if unknown := inner.keys() - {"name", "description", "schema", "strict"}:
                unknown_name = shortened(min(unknown))
                raise BadRequest(f"{name}.json_schema.{unknown_name} is not supported", name)
            return [(name, partial(_json_grammar, inner["schema"], name))]
        case other:
            raise BadRequest(
                f"{name}.type must be text, json_object or json_schema, not {_short(repr(other))}",
                name,
            )


# --- kinds ---------------------------------------------------------------------------------------


def _json_grammar(value: Any, field: str) -> str:
    from llguidance import LLMatcher

    schema = json.loads(value) if isinstance(value, str) else value
    if not isinstance(schema, dict):
        raise BadRequest(f"{field} must be a JSON schema, an object", field)
    check_schema(schema, field)
    # Without $schema it is read as draft 2020-12: older drafts ignore what is beside a $ref.
    schema = {name: part for name, part in schema.items() if name != "$schema"}
    text = json.dumps(schema, allow_nan=False)
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})


def _regex_grammar(value: Any, field: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(_text(value, field))


def _choice_grammar(value: Any, field: str) -> str:
    if not isinstance(value, list) or not value or not all(value):
        raise BadRequest(f"{field} must be a list of texts that are not empty", field)
    # Escaped one by one: no character has a meaning.
    texts = ["".join(f"\\x{{{ord(c):x}}}" for c in _text(item, field)) for item in value]
    return _regex_grammar("|".join(texts), field)


def _lark_grammar(value: Any, field: str) -> str:
    """Of a grammar in llguidance's variant of Lark, or in GBNF (llama.cpp)."""
    from llguidance import grammar_from

    text = _text(value, field)
    if len(text) > MAX_CHARACTERS:
        raise BadRequest(f"{field} has more than {MAX_CHARACTERS} characters", field)
    if TEMPERATURE.search(text):
        raise BadRequest(f"{field}: the option temperature is not supported", field)
    for found in re.finditer(r"%json\s*", text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, found.end())
        except ValueError:
            continue  # within a text; elsewhere llguidance refuses it
        check_schema(schema, field)
    try:
        return grammar_from("grammar", text)
    except Exception as error:  # the conversion from GBNF may raise any error
        raise BadRequest(f"{field} is not a grammar ({_short(str(error))})", field) from error


MAKERS = {
    "json": _json_grammar,
    "regex": _regex_grammar,
    "choice": _choice_grammar,
    "grammar": _lark_grammar,
}


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{field} must be text, not {_short(repr(value))}", field)
    value.encode()  # ValueError for a lone surrogate
    return value


# --- trial ---------------------------------------------------------------------------------------


class GrammarTrials:
    """Tries grammars with the tokenizer of one model, as its workers will apply them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._tools: Any = None  # llguidance.LLTokenizer
        self._passed: dict[str, None] = {}  # in the order of their use

    def check(self, grammar: str, field: str) -> None:
        """Raises BadRequest with the reason if the grammar cannot be applied."""
        if grammar in self._passed:
            return
        try:
            tools = self._loaded()
        except ValueError as error:
            why = _short(str(error))
            raise BadRequest(f"{field} is not supported with this model ({why})", field) from error
        problem = _within(TRIAL_S, lambda: _problem(tools, grammar))
        if problem is None:
            problem = "it is too complex"
        if problem:
            raise BadRequest(f"{field}: no grammar can be made of it: {problem}", field)
        self._passed[grammar] = None
        if len(self._passed) > PASSED:
            del self._passed[next(iter(self._passed))]

    def _loaded(self) -> Any:
        """Return llguidance's tokenizer. ValueError if it has no equal there."""
        from llguidance import LLTokenizer

        if self._tools is None:
            if self._tokenizer.json is None:
                raise ValueError("it has no tokenizer.json")
            tools, ours = LLTokenizer(self._tokenizer.json), self._tokenizer.token_bytes
            for token in range(min(tools.vocab_size, self._vocab_size)):
                if not tools.is_special_token(token) and tools.decode_bytes([token]) != ours[token]:
                    raise ValueError(f"llguidance reads the token {ours.name(token)!r} differently")
            self._tools = tools
        return self._tools


def _problem(tokenizer: Any, grammar: str) -> str:
    """Return why the grammar cannot be applied, or "". Decodes some tokens under it."""
    import numpy as np
    from llguidance import LLMatcher, LLParserLimits
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**GRAMMAR_LIMITS))
    if matcher.is_error():
        return _short(matcher.get_error())
    if warnings := matcher.get_grammar_warnings():
        return _short(warnings[0])
    mask = allocate_token_bitmask(1, tokenizer.vocab_size)
    for step in range(TRIAL_TOKENS):
        fill_next_token_bitmask(matcher, mask)
        if matcher.is_error():
            return "it is too complex" if step else "no answer can satisfy it"
        ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        ids = ids[~np.isin(ids, tokenizer.eos_tokens)]
        if not len(ids):
            break
        matcher.consume_token(int(ids[step * 7919 % len(ids)]))
    return ""


def _within(seconds: float, call: Callable[[], str]) -> str | None:
    """Return the result of `call`, or None if it takes longer; then it goes on in its thread."""
    results: list[str] = []
    thread = Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:197]}..."
