"""A model that follows grammars: it says what it wants where it may, else the least."""

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from mellmpi.frontend import Tokenizer

LETTER = "a"
CLOSING = '"}]'  # end what is open


class Obedient:
    """Answers of models to requests with a grammar."""

    def __init__(self, directories):
        """`directories`: of each model, by name"""
        self._directories, self._loaded, self._matchers = directories, {}, {}

    def token(self, request, outputs, done):
        """The next token, or None at the end of the answer.

        done  whether to end where the grammar allows it; else letters follow
        """
        tools, letter, closing = self._model(request.model)
        matcher, count = self._matchers.pop(request.id, (None, 0))
        if matcher is None:
            matcher = LLMatcher(tools, request.sampling.grammar, log_level=0)
        matcher.consume_tokens(outputs[count:])
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        may_end = matcher.is_accepting()
        if may_end and (done or letter not in allowed):
            return None
        self._matchers[request.id] = (matcher, len(outputs))
        wanted = [letter] if may_end else closing
        return next((token for token in wanted if token in allowed), int(allowed[0]))

    def _model(self, name):
        if name not in self._loaded:
            tokenizer = Tokenizer.load(self._directories[name])
            closing = [token for char in CLOSING for token in tokenizer.encode(char)[-1:]]
            letter = tokenizer.encode(LETTER)[-1]
            self._loaded[name] = LLTokenizer(tokenizer.json), letter, closing
        return self._loaded[name]
