"""Decodes token ids to text incrementally, one token at a time.

A token stands for bytes, and a character may need the bytes of several tokens. So text is decoded
from bytes, not from token texts. The bytes of a token follow from the `decoder` in tokenizer.json
(module `decoders` of the `tokenizers` library).
"""

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Regex, decoders
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CHARACTER_BYTES = 4  # maximum of UTF-8
_MARK_PER_BYTE = "mellmpi.mark_per_byte"  # an error handler of codecs

DecodeStep = Callable[[str | bytes], str | bytes]  # a step from a token's name to its bytes


def _mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_MARK_PER_BYTE, _mark_each_byte)


class TokenBytes:
    """The bytes of every token of a tokenizer. Raises ValueError if its decoder is unsupported."""

    def __init__(self, backend: Backend):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special = {i for i, token in added.items() if token.special}
        self.added_names = [token.content for token in added.values()]
        self._cache: dict[int, bytes] = {}
        state = backend.decoder.__getstate__() if backend.decoder else b"null"  # its JSON
        decoder = _flattened(json.loads(state))
        kinds = [step["type"] for step in decoder]
        fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)  # later steps: whole texts
        self._steps = [_step(step, i < fused) for i, step in enumerate(decoder)]
        self._first_steps = [_first_step(step, i < fused) for i, step in enumerate(decoder)]
        by_bytes = any(step["type"] == "ByteFallback" for step in decoder)
        # Invalid UTF-8: byte-level decoders put a replacement mark per broken character,
        # SentencePiece one per byte.
        self.errors = _MARK_PER_BYTE if by_bytes else "replace"

    def __getitem__(self, token: int) -> bytes:
        """The bytes that the token adds to a text; b"" for special tokens and unknown ids."""
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._decode(self._steps, token)
        return found

    def first(self, token: int) -> bytes:
        """Return the bytes of the token at the beginning of a text."""
        return self._decode(self._first_steps, token)

    def _decode(self, steps: list[DecodeStep], token: int) -> bytes:
        if token in self.special or (name := self.name(token)) is None:
            return b""
        value: str | bytes = name
        for step in steps:
            value = step(value)
        return value if isinstance(value, bytes) else value.encode("utf-8", "replace")

    def name(self, token: int) -> str | None:
        """Return the token's name in the vocabulary; None: there is no such token."""
        if not 0 <= token < 2**32:
            return None
        name: str | None = self._backend.id_to_token(token)
        return name

    def label(self, token: int) -> str:
        """Return the token as readable text, special ones too; parts of a character as escapes."""
        if token in self.special:
            return self.name(token) or ""
        data = self[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in data)


class TextStream:
    """Decodes a stream of tokens; returns complete characters only.

    The text of the prompt and all returned text together are the text of all tokens.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        prompt: Sequence[int] = (),
        shown: Mapping[int, bytes] | None = None,
    ):
        """`shown`: special tokens that have a text all the same."""
        self._bytes, self._shown = token_bytes, shown or {}
        self._decoder = codecs.getincrementaldecoder("utf-8")(token_bytes.errors)
        self._at_start = not any(token_bytes[token] for token in prompt)
        self._tail = self._incomplete_end(prompt)
        self.data = b""  # of the last token

    def push(self, token: int) -> str:
        """Add a token. Returns the text that it completes, which may be empty."""
        data = self._shown.get(token) or self._bytes[token]
        if data and self._at_start:
            data = self._shown.get(token) or self._bytes.first(token)
            self._at_start = False
        if data and self._tail:
            self._continue_tail(data)
        self.data = data
        return self._decoder.decode(data)

    def finish(self) -> str:
        """End the stream. Returns replacement marks for an incomplete character."""
        return self._decoder.decode(b"", final=True)

    def _incomplete_end(self, prompt: Sequence[int]) -> bytes:
        """Return the bytes at the end of a prompt that begin an incomplete character."""
        end = b""
        for token in reversed(prompt):
            if len(end) >= _CHARACTER_BYTES:
                break
            end = self._bytes[token] + end
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(end)
        return decoder.getstate()[0]

    def _continue_tail(self, data: bytes) -> None:
        """Decode the incomplete character of the prompt if `data` continues it."""
        try:
            codecs.getincrementaldecoder("utf-8")().decode((self._tail + data)[:_CHARACTER_BYTES])
            self._decoder.decode(self._tail)
        except UnicodeDecodeError:
            pass  # the text of the prompt has a replacement mark there
        self._tail = b""


# --- decoders of tokenizer.json ------------------------------------------------------------------


def _flattened(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return [{"type": "None"}]
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flattened(part)]
    return [decoder]


def _step(step: dict[str, Any], for_each: bool) -> DecodeStep:
    """Return a step of the decoder for one token. It leaves bytes unchanged.

    for_each  the step applies to each token, not to the whole text
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
            return _on_names(lambda name: _word_piece(name, prefix))
        case {"type": "BPEDecoder", "suffix": suffix}:
            return _on_names(lambda name: name.replace(suffix, " "))
        case {"type": "None"}:
            return _on_names(lambda name: f" {name}")
        case {"type": "Strip", "content": mark, "start": count} if for_each:
            return lambda value: _stripped(value, mark, count)
        case {"type": "Fuse" | "Strip"}:
            return lambda value: value
    raise ValueError(f"the decoder {step['type']!r} of this tokenizer is not supported")


def _first_step(step: dict[str, Any], for_each: bool) -> DecodeStep:
    """Return a step of the decoder for the first token of a text."""
    match step:
        case {"type": "Metaspace", "prepend_scheme": "always" | "first", "replacement": mark}:
            return _on_names(lambda name: name.replace(mark, ""))
        case {"type": "Strip", "content": mark, "start": count}:
            return lambda value: _stripped(value, mark, count)
        case {"type": "WordPiece" | "None"}:
            return lambda value: value
    return _step(step, for_each)


def _on_names(step: Callable[[str], str | bytes]) -> DecodeStep:
    return lambda value: step(value) if isinstance(value, str) else value


def _stripped(value: str | bytes, mark: str, most: int) -> str | bytes:
    for _ in range(most):
        if isinstance(value, str):
            value = value.removeprefix(mark)
        else:
            value = value.removeprefix(mark.encode())
    return value


def _word_piece(name: str, prefix: str) -> str:
    return name.removeprefix(prefix) if name.startswith(prefix) else f" {name}"


def _byte_fallback(name: str) -> str | bytes:
    found = _BYTE.fullmatch(name)
    return bytes([int(found[1], 16)]) if found else name


def _byte_values() -> dict[str, int]:
    """Return GPT-2's byte alphabet: printable bytes are their own characters, the others are
    characters 256, 257, …"""
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
