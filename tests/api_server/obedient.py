"""A model that follows grammars: it says the least that a grammar allows."""

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from mellmpi.frontend import Tokenizer

CLOSING = '"}]'  # end what is open


class Obedient:
    """Answers of models to requests with a grammar."""

    def __init__(self, directories):
        """`directories`: of each model, by name"""
        self._directories, self._loaded, self._matchers = directories, {}, {}

    def token(self, request, outputs):
        """The next token, or None at the end of the answer."""
        tools, closing = self._model(request.model)
        matcher, count = self._matchers.pop(request.id, (None, 0))
        if matcher is None:
            matcher = LLMatcher(tools, request.sampling.grammar, log_level=0)
        matcher.consume_tokens(outputs[count:])
        if matcher.is_accepting():
            return None
        self._matchers[request.id] = (matcher, len(outputs))
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        return next((token for token in closing if token in allowed), int(allowed[0]))

    def _model(self, name):
        if name not in self._loaded:
            tokenizer = Tokenizer.load(self._directories[name])
            closing = [token for char in CLOSING for token in tokenizer.encode(char)[-1:]]
            self._loaded[name] = LLTokenizer(tokenizer.json), closing
        return self._loaded[name]
