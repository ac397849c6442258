"""The text of a prompt, token by token, to precede the text of its answer."""

import itertools
from collections.abc import Sequence

from mellmpi.frontend.tokenizer import Tokenizer


class Echo:
    """An echoed prompt. `stream` decodes the tokens that follow it.

    The texts joined are `text`; a character of several tokens belongs to the last of them. Special
    tokens have no text, as in answers, but where the prompt was given as text that names them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], given: str | None, alone: bool):
        """
        given  the prompt as text; None: given as token ids
        alone  no answer follows
        """
        self.tokens = tuple(prompt)
        self.stream = tokenizer.stream()
        self.texts: list[str] = []
        token_bytes, length = tokenizer.token_bytes, 0
        for token in prompt:
            text = self.stream.push(token)
            name = token_bytes.name(token) if token in token_bytes.special else None
            if name and given is not None and given.startswith(name, length):
                text += name
            self.texts.append(text)
            length += len(text)
        if alone and self.texts:
            self.texts[-1] += self.stream.finish()
        self.text = "".join(self.texts)

    @property
    def offsets(self) -> list[int]:
        """The offset of each token's text, in characters."""
        return list(itertools.accumulate(map(len, self.texts), initial=0))[:-1]
