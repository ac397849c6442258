"""Text to tokens and back, with `tokenizers` and jinja2 alone: rank 0 needs no torch for it.

Reading the demo model's tokenizer so takes 0.2 s of start-up; through transformers' AutoTokenizer,
which imports torch, it takes 2.4 s.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

Message = dict[str, Any]

# A template is the model's code run on the client's data: this is what that can come to.
_TEMPLATE_FAULTS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip


class Tokenizer:
    """The tokenizer and chat template of one model directory."""

    def __init__(self, backend: Backend, template: str | None, special: dict[str, str]):
        backend.no_truncation()  # a saved tokenizer may carry either, and both would
        backend.no_padding()  # change prompts silently
        self._backend, self._special = backend, special
        self._template = None if template is None else _environment().from_string(template)

    @classmethod
    def load(cls, directory: Path, chat_template: Path | None = None) -> "Tokenizer":
        """Read `directory`; a `chat_template` file takes the place of the model's own."""
        config = _json(directory / "tokenizer_config.json")
        if chat_template is not None:
            template = _read(chat_template, "--chat-template")
        else:
            template = _own_template(directory, config)
        special = _special_tokens(_json(directory / "special_tokens_map.json") | config)
        try:
            return cls(_backend(directory), template, special)
        except TemplateError as error:
            source = chat_template or directory
            raise ValueError(f"the chat template of {source} is not valid: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with what the model wants before it (a BOS token, mostly)."""
        return list(self._backend.encode(text).ids)

    def encode_chat(self, messages: list[Message], **variables: Any) -> list[int]:
        """Token ids of a conversation, ready for the model's turn.

        ValueError if there is no template, or if the template refuses these messages.
        """
        if self._template is None:
            raise ValueError("this model has no chat template; use /v1/completions instead")
        given = {"add_generation_prompt": True, **variables}
        try:
            text = self._template.render(messages=messages, **self._special, **given)
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except _TEMPLATE_FAULTS as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, special ones left out."""
        return self._backend.decode(tokens, skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """One token for people to read, special ones included."""
        return self._backend.decode([token], skip_special_tokens=False)

    def stream(self) -> "TextStream":
        """A decoder for tokens that arrive one after the other."""
        return TextStream(self._backend)


class TextStream:
    """Tokens in, text out, never half a character; all deltas together are `decode` of it all."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._length = 0  # characters given out

    def push(self, token: int) -> str:
        """The text that this token completes, often a word and sometimes nothing yet."""
        self._tokens.append(token)
        delta = self._decoder.step(self._backend, token) or ""
        self._length += len(delta)
        return delta

    def finish(self) -> str:
        """What is still held back: bytes that never became a character, as replacement marks."""
        return self._backend.decode(self._tokens, skip_special_tokens=True)[self._length :]


# --- files ---------------------------------------------------------------------------------------


def _backend(directory: Path) -> Backend:
    file = directory / "tokenizer.json"
    if file.exists():
        return Backend.from_file(str(file))
    if not any((directory / name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise ValueError(f"{directory} has no tokenizer.json, tokenizer.model or vocab.json")
    from transformers import AutoTokenizer  # slow to import, and able to convert older files

    return AutoTokenizer.from_pretrained(str(directory), use_fast=True).backend_tokenizer


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _read(file: Path, option: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} {file} cannot be read: {error}") from error


def _own_template(directory: Path, config: dict[str, Any]) -> str | None:
    if (file := directory / "chat_template.jinja").exists():
        return file.read_text(encoding="utf-8")
    template = _json(directory / "chat_template.json") or config
    found = template.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, which templates may print."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


# --- the environment in which chat templates are written (that of transformers) ------------------


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training: here it is only text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    # jinja2's own escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise(message: str) -> None:
    raise TemplateError(message)
