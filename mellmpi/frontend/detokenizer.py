"""Token ids to text, one token at a time: what each token adds to the text before it.

A token stands for bytes, and a character may need the bytes of several tokens. So text is made of
bytes here, not of decoded tokens. Which bytes a token stands for is read from the decoder of its
tokenizer.json (the `tokenizers` library, module decoders).
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Regex, decoders
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CHARACTER_BYTES = 4  # of UTF-8, at most
_ONE_MARK_A_BYTE = "mellmpi.one_mark_a_byte"  # an error handler of codecs

Piece = Callable[[str | bytes], str | bytes]  # one step from a token's name towards its bytes


def _mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_ONE_MARK_A_BYTE, _mark_each_byte)


class TokenBytes:
    """The bytes of every token of one tokenizer. ValueError if its decoder is not supported."""

    def __init__(self, backend: Backend):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special = {i for i, token in added.items() if token.special}
        self.added_names = [token.content for token in added.values()]
        self._known: dict[int, bytes] = {}
        state = backend.decoder.__getstate__() if backend.decoder else b"null"  # its JSON
        decoder = _flat(json.loads(state))
        kinds = [step["type"] for step in decoder]
        fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)  # from here on: whole texts
        self._steps = [_step(step, i < fused) for i, step in enumerate(decoder)]
        self._first_steps = [_first_step(step, i < fused) for i, step in enumerate(decoder)]
        by_bytes = any(step["type"] == "ByteFallback" for step in decoder)
        # Bytes that are no text: byte-level decoders mark each broken character, SentencePiece
        # each byte.
        self.errors = _ONE_MARK_A_BYTE if by_bytes else "replace"

    def __getitem__(self, token: int) -> bytes:
        """What the token adds to a text; nothing for special tokens and ids without a token."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._through(self._steps, token)
        return found

    def first(self, token: int) -> bytes:
        """The same where a text begins with it."""
        return self._through(self._first_steps, token)

    def _through(self, steps: list[Piece], token: int) -> bytes:
        if token in self.special or (name := self.name(token)) is None:
            return b""
        value: str | bytes = name
        for step in steps:
            value = step(value)
        return value if isinstance(value, bytes) else value.encode("utf-8", "replace")

    def name(self, token: int) -> str | None:
        """How the vocabulary spells the token; None: there is no such token."""
        if not 0 <= token < 2**32:
            return None
        name: str | None = self._backend.id_to_token(token)
        return name

    def label(self, token: int) -> str:
        """The token for people to read, special ones included; part of a character as escapes."""
        if token in self.special:
            return self.name(token) or ""
        data = self[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in data)


class TextStream:
    """Tokens in, text out, never half a character.

    The text of a prompt and all that comes out here are together the text of all tokens.
    """

    def __init__(self, token_bytes: TokenBytes, prompt: Sequence[int] = ()):
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(token_bytes.errors)
        self._at_start = not any(token_bytes[token] for token in prompt)
        self._tail = self._cut_off(prompt)
        self.data = b""  # of the last token

    def push(self, token: int) -> str:
        """The text that this token completes, often a word and sometimes nothing yet."""
        data = self._bytes[token]
        if data and self._at_start:
            data = self._bytes.first(token)
            self._at_start = False
        if data and self._tail:
            self._continue_tail(data)
        self.data = data
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Bytes that never became a character, as replacement marks."""
        return self._decoder.decode(b"", final=True)

    def _cut_off(self, prompt: Sequence[int]) -> bytes:
        """The bytes at the end of a prompt that begin a character."""
        end = b""
        for token in reversed(prompt):
            if len(end) >= _CHARACTER_BYTES:
                break
            end = self._bytes[token] + end
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(end)
        return decoder.getstate()[0]

    def _continue_tail(self, data: bytes) -> None:
        """Complete the prompt's last character, if these bytes do."""
        try:
            codecs.getincrementaldecoder("utf-8")().decode((self._tail + data)[:_CHARACTER_BYTES])
            self._decoder.decode(self._tail)
        except UnicodeDecodeError:
            pass  # the text of the prompt has a replacement mark there
        self._tail = b""


# --- decoders of tokenizer.json ------------------------------------------------------------------


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return [{"type": "None"}]
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flat(part)]
    return [decoder]


def _step(step: dict[str, Any], for_each: bool) -> Piece:
    """One step of a decoder, on one token's name. What is bytes already stays.

    for_each  it is done to each token, not to the whole text
    """
    match step:
        case {"type": "ByteLevel"}:
            return _on_names(_byte_level)
        case {"type": "ByteFallback"}:
            return _on_names(_byte_fallback)
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return _on_names(lambda name: name.replace(old, new))
        case {"type": "Replace", "pattern": {"Regex": regex}, "content": new}:
            replace = decoders.Replace(Regex(regex), new)
            return _on_names(lambda name: replace.decode([name]))
        case {"type": "Metaspace", "replacement": mark}:
            return _on_names(lambda name: name.replace(mark, " "))
        case {"type": "WordPiece", "prefix": prefix}:
            return _on_names(lambda name: _continued(name, prefix))
        case {"type": "BPEDecoder", "suffix": suffix}:
            return _on_names(lambda name: name.replace(suffix, " "))
        case {"type": "None"}:
            return _on_names(lambda name: f" {name}")
        case {"type": "Strip", "content": mark, "start": count} if for_each:
            return lambda value: _without(value, mark, count)
        case {"type": "Fuse" | "Strip"}:
            return lambda value: value
    raise ValueError(f"the decoder {step['type']!r} of this tokenizer is not supported")


def _first_step(step: dict[str, Any], for_each: bool) -> Piece:
    """The same for the first token of a text."""
    match step:
        case {"type": "Metaspace", "prepend_scheme": "always" | "first", "replacement": mark}:
            return _on_names(lambda name: name.replace(mark, ""))
        case {"type": "Strip", "content": mark, "start": count}:
            return lambda value: _without(value, mark, count)
        case {"type": "WordPiece" | "None"}:
            return lambda value: value
    return _step(step, for_each)


def _on_names(step: Callable[[str], str | bytes]) -> Piece:
    return lambda value: step(value) if isinstance(value, str) else value


def _without(value: str | bytes, mark: str, most: int) -> str | bytes:
    for _ in range(most):
        if isinstance(value, str):
            value = value.removeprefix(mark)
        else:
            value = value.removeprefix(mark.encode())
    return value


def _continued(name: str, prefix: str) -> str:
    return name.removeprefix(prefix) if name.startswith(prefix) else f" {name}"


def _byte_fallback(name: str) -> str | bytes:
    found = _BYTE.fullmatch(name)
    return bytes([int(found[1], 16)]) if found else name


def _byte_values() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, others for 256, 257, …"""
    alphabet = set(ByteLevel.alphabet())
    plain = [b for b in range(256) if chr(b) in alphabet]
    others = [b for b in range(256) if chr(b) not in alphabet]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_VALUES = _byte_values()


def _byte_level(name: str) -> bytes:
    try:
        return bytes([_BYTE_VALUES[character] for character in name])
    except KeyError:  # a token that was added as text
        return name.encode("utf-8", "replace")
