"""Tokenizers and chat templates, with the `tokenizers` library and jinja2 only.

Loading the demo model's tokenizer takes 0.2 s this way. With transformers' AutoTokenizer, which
imports torch, it takes 2.4 s.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from jinja2 import Template, TemplateError
from tokenizers import Tokenizer as Backend

from mellmpi.frontend.detokenizer import TextStream, TokenBytes
from mellmpi.frontend.templates import compiled

Message = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")

ANSWER_MARK = "mellmpi-answer"  # the answer in a trial of a template
UNCHECKED = 200_000  # characters of a text that is tokenized in any case


class TooLong(ValueError):
    """The text has more tokens than the model's context for certain."""


class Tokenizer:
    """The tokenizer and chat template of one model directory."""

    def __init__(
        self,
        backend: Backend,
        template: str | None,
        special: dict[str, str],
        own_template: str | None = None,
    ):
        """`own_template`: the template of the model if `template` replaces it."""
        backend.no_truncation()  # a saved tokenizer may have both enabled, and they would
        backend.no_padding()  # change prompts silently
        self._backend, self._special = backend, special
        self.token_bytes = TokenBytes(backend)
        self.json: str | None = None  # tokenizer.json, if the model has one, for grammars
        self._template = compiled(template)
        self.template = template or ""  # its text
        self.config: dict[str, Any] = {}  # tokenizer_config.json
        self._longest_token: int | None = None  # characters; computed for the first long text
        self.end_ids = self._end_ids((template, own_template))

    @classmethod
    def load(cls, directory: Path, chat_template: Path | None = None) -> "Tokenizer":
        """Read the tokenizer of a model directory. Raises ValueError.

        chat_template  file that replaces the template of the model
        """
        try:
            return cls._load(directory, chat_template)
        except ValueError as error:
            raise ValueError(" ".join(str(error).split())) from error
        except Exception as error:  # a damaged file may raise any error
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"the tokenizer in {directory} cannot be read ({why[:300]}); copy or "
                "download its files again"
            ) from error

    @classmethod
    def _load(cls, directory: Path, chat_template: Path | None) -> "Tokenizer":
        config = _json(directory / "tokenizer_config.json")
        own = template = _own_template(directory, config)
        if chat_template is not None:
            template = _read(chat_template, "--chat-template")
        special = _special_tokens(_json(directory / "special_tokens_map.json") | config)
        try:
            tokenizer = cls(_backend(directory), template, special, own)
        except TemplateError as error:
            source = chat_template or directory
            raise ValueError(f"the chat template of {source} is not valid: {error}") from error
        if (file := directory / "tokenizer.json").exists():
            tokenizer.json = file.read_text(encoding="utf-8")
        tokenizer.config = config
        return tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Return the token ids of plain text, with the model's prefix, such as a BOS token.

        Raises ValueError if the tokenizer cannot process the text, or if the text is so long that
        it has more than `max_tokens` tokens for certain.
        """
        self._check_length(text, max_tokens)
        return list(_without_panic(self._backend.encode, text).ids)

    def encode_chat(
        self,
        messages: list[Message],
        variables: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, rendered by the chat template.

        Raises ValueError if there is no template, if the template refuses the messages, or if the
        rendered text is too long: see `encode`.
        """
        if self._template is None:
            raise ValueError("this model has no chat template; use /v1/completions instead")
        try:
            text = self._render(self._template, messages, variables or {})
            self._check_length(text, max_tokens)
            return list(_without_panic(self._backend.encode, text, add_special_tokens=False).ids)
        except TooLong:
            raise
        except Exception as error:  # the template may raise any error
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def _check_length(self, text: str, max_tokens: int | None) -> None:
        """Tokenizing megabytes takes seconds, in which no other request is served."""
        if max_tokens is None or len(text) <= UNCHECKED:
            return
        if self._longest_token is None:
            self._longest_token = max(map(len, self._backend.get_vocab()))
        # Twice: a normalizer may shorten the text, as by joining spaces.
        if len(text) > max(UNCHECKED, 2 * max_tokens * self._longest_token):
            raise TooLong(
                f"this model's context is {max_tokens} tokens; a text of {len(text)} characters "
                "does not fit"
            )

    def _render(
        self, template: Template, messages: list[Message], variables: Mapping[str, Any]
    ) -> str:
        # transformers passes these to every template: a variable that is None is defined.
        defaults = {"tools": None, "documents": None, "add_generation_prompt": True}
        return template.render({**defaults, **self._special, **variables, "messages": messages})

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        stream = self.stream()
        return "".join([*map(stream.push, tokens), stream.finish()])

    def stream(self, prompt: Sequence[int] = (), shown: Sequence[str] = ()) -> TextStream:
        """Return an incremental decoder for the tokens that follow a prompt.

        shown  names of special tokens that have a text all the same
        """
        ids = {self.special_id(name): name.encode() for name in shown}
        return TextStream(self.token_bytes, prompt, {i: d for i, d in ids.items() if i is not None})

    def ends_with(self, tokens: Sequence[int], text: str) -> bool:
        """Whether the text of tokens ends with a short text, which may be a special token."""
        stream = self.stream(shown=(text,))
        return "".join(map(stream.push, tokens[-2 * len(text) :])).rstrip().endswith(text)

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token with this name, or None."""
        token = self._backend.token_to_id(text)
        return token if token in self.token_bytes.special else None

    def special_inside(self, text: str) -> str | None:
        """Return the name of a special token that `text` contains, or None."""
        special = self.token_bytes.special
        names = (self.token_bytes.name(token) for token in special)
        return next((name for name in names if name and name in text), None)

    def _end_ids(self, templates: Iterable[str | None]) -> tuple[int, ...]:
        """Return tokens that end an answer: EOS, and the end-of-turn tokens of the templates."""
        names = [self._special.get("eos_token"), *map(self._end_of_turn, templates)]
        ids = (self._backend.token_to_id(name) for name in names if name)
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def _end_of_turn(self, template: str | None) -> str | None:
        """Return the name of the added token that a template prints after an answer, or None."""
        conversation = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": ANSWER_MARK},
        ]
        try:
            trial = compiled(template)
            if trial is None:
                return None
            text = self._render(trial, conversation, {"add_generation_prompt": False})
        except Exception:  # a template that refuses this conversation
            return None
        after = text.rpartition(ANSWER_MARK)[2].lstrip()
        found = [name for name in self.token_bytes.added_names if after.startswith(name)]
        return max(found, key=len, default=None)


def _without_panic(call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Call the tokenizers library. Raises ValueError if its Rust code panics."""
    try:
        return call(*args, **options)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer cannot take this text ({error})") from error


# --- files ---------------------------------------------------------------------------------------


def _backend(directory: Path) -> Backend:
    file = directory / "tokenizer.json"
    if file.exists():
        try:
            return _without_panic(Backend.from_buffer, file.read_bytes())
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"{file} cannot be read ({why}); copy or download it again") from error
    if not any((directory / name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise ValueError(f"{directory} has no tokenizer.json, tokenizer.model or vocab.json")
    from transformers import AutoTokenizer  # slow to import, but converts older formats

    try:
        return AutoTokenizer.from_pretrained(str(directory), use_fast=True).backend_tokenizer
    except ValueError as error:  # its text may have several lines
        raise ValueError(" ".join(str(error).split())) from error


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object; copy or download it again")
    return value


def _read(file: Path, option: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} {file} cannot be read ({error}): save it as UTF-8") from error


def _own_template(directory: Path, config: dict[str, Any]) -> str | None:
    if (file := directory / "chat_template.jinja").exists():
        return _read(file, "the chat template")
    template = _json(directory / "chat_template.json") or config
    found = template.get("chat_template")
    if isinstance(found, list):  # several templates, by name
        named = [entry for entry in found if isinstance(entry, dict)]
        found = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if not isinstance(found, str | None):
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: chat_template must be a text or "
            "a list of named texts; give another with --chat-template"
        )
    return found


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return `bos_token` and the other special tokens that templates may use."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found
