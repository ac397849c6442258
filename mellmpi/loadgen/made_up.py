"""Made-up prompts of a given number of tokens, and the tokenizer that counts them."""

import random
import re
from pathlib import Path
from typing import Any

# Each is one token with a space before it, in the vocabularies of the usual models.
TEXT = (
    "time people way water words man work part place things years number name home air line "
    "house page country food sun earth head story far hand high year mother light father night "
    "picture life paper group side feet car book room friend idea fish mountain north base "
    "horse color face wood list bird body dog family song door product wind question ship area "
    "rock order fire south problem piece top king street surface moon island foot table morning "
    "state field road war town church party school city level power force class money service "
    "market office music art board century history law development death point model report "
    "data world village"
)
WORDS = TEXT.split()
PLAIN_IDS = range(300, 1000)  # neither bytes nor special tokens in the usual vocabularies
TRIES = 10
FEW = 100  # tokens; a vocabulary with fewer words is used as a whole
WORD = re.compile("[Ġ▁][A-Za-z]{2,}")  # with a space before it: byte-level BPE, SentencePiece


class Vocabulary:
    """A tokenizer, read with the `tokenizers` library."""

    def __init__(self, backend: Any):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        ordinary = {text: i for text, i in backend.get_vocab(False).items() if i not in added}
        words = [i for text, i in ordinary.items() if WORD.fullmatch(text)]
        # A text of words nearly always has the tokens that it was made of.
        self.ids = sorted(words if len(words) >= FEW else ordinary.values())

    @classmethod
    def load(cls, name: str) -> "Vocabulary":
        """Read a directory with tokenizer.json, that file, or a hub name. Raises ValueError."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError(
                "--tokenizer needs the tokenizers library: pip install 'mellmpi[bench]'"
            ) from error
        path = Path(name)
        file = path / "tokenizer.json" if path.is_dir() else path
        if path.is_dir() and not file.exists():
            raise ValueError(f"--tokenizer {name} has no tokenizer.json")
        try:
            if path.exists():
                return cls(Tokenizer.from_file(str(file)))
            return cls(Tokenizer.from_pretrained(name))
        except Exception as error:  # of the library, which has no class of its own
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"--tokenizer {name} cannot be read: {why}") from error

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without special ones that a model adds."""
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids))


class MadeUp:
    """Draws random prompts. The same seed gives the same prompts."""

    def __init__(self, vocabulary: Vocabulary | None, as_ids: bool, seed: int):
        self._vocabulary, self._as_ids = vocabulary, as_ids
        self._random = random.Random(seed)

    def tokens(self, number: int) -> list[Any]:
        """Return random tokens: ids, or words of one token each if there is no vocabulary."""
        if self._vocabulary is not None:
            return self._random.choices(self._vocabulary.ids, k=number)
        return self._random.choices(PLAIN_IDS if self._as_ids else WORDS, k=number)

    def prompt(self, prefix: list[Any], number: int) -> tuple[str | list[int], int]:
        """Return `prefix` and `number` random tokens, as text or as ids, and how many they are.

        A text may have other tokens than those it was made of. It is mended until their number is
        right, TRIES times at most.
        """
        tokens = prefix + self.tokens(number)
        if self._as_ids:
            return tokens, len(tokens)
        if self._vocabulary is None:
            return " ".join(tokens), len(tokens)
        wanted, text, found = len(tokens), "", 0
        for _ in range(TRIES):
            text = self._vocabulary.decode(tokens)
            tokens = self._vocabulary.encode(text)
            if (found := len(tokens)) == wanted:
                break
            tokens = tokens[:wanted] + self.tokens(wanted - found)
        return text, found
