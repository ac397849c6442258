"""Grammars of requests: the tokens that may come next, found by llguidance.

The mask of a row is a function of the request's grammar and outputs. A matcher caches the state
after some outputs; after a move, a preemption or a loss it is made again from the outputs. Matchers
share nothing, not even those of equal grammars: a limit that one reaches would end the others.

A stop token of the request is allowed exactly where the grammar accepts the output. If nothing is
allowed, or the matcher fails at one of its limits, the first stop token is: the answer ends, and
never goes on as free text.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mellmpi.protocol import GRAMMAR_LIMITS, Chunk, Sampling

log = logging.getLogger(__name__)

KEPT = 256  # matchers of requests that are not in the present step

END = "<|mellmpi-end|>"

Masks = dict[int, np.ndarray]
"""Row -> uint8 [ceil(vocab / 8)]: whether each token may come next, a bit each, lowest bit first"""


@dataclass(slots=True)
class _State:
    """A matcher that has consumed the first `count` outputs of a request."""

    matcher: Any  # llguidance.LLMatcher
    outputs: list[int]  # the list of the sequence, which grows
    count: int

    def precedes(self, outputs: list[int]) -> bool:
        """Whether these outputs begin with the consumed ones."""
        if outputs is self.outputs:
            return True
        return self.outputs[: self.count] == outputs[: self.count]


class Grammars:
    """The matchers of one model's requests."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, num_threads: int):
        """
        tokenizer_file  tokenizer.json, read with the first grammar
        vocab_size      logits of a row; tokens unknown to the tokenizer are never allowed
        num_threads     threads that compute masks
        """
        self._file, self._vocab_size, self._num_threads = tokenizer_file, vocab_size, num_threads
        self._executor: Any = None  # llguidance.LLExecutor
        self._states: OrderedDict[int, _State] = OrderedDict()  # by request, the latest used last

    def masks(self, chunks: Sequence[Chunk]) -> Masks:
        """Return the masks of the rows that have a grammar. Each allows at least one token."""
        rows = [row for row, chunk in enumerate(chunks) if _sampling(chunk).grammar]
        if not rows:
            return {}
        states = [self._advanced(chunks[row]) for row in rows]
        bits = self._computed([state.matcher for state in states])
        for index, row in enumerate(rows):
            if states[index].matcher.is_error():  # of a limit that counts the past computations
                states[index] = self._rebuilt(chunks[row])
                bits[index] = self._computed([states[index].matcher])[0]
        while len(self._states) > len(rows) + KEPT:
            self._states.popitem(last=False)
        return {
            row: self._with_stops(bits[index], chunks[row], states[index].matcher)
            for index, row in enumerate(rows)
        }

    def _computed(self, matchers: list[Any]) -> np.ndarray:
        """uint8 [matchers, bytes]: the masks, also of ids beyond the logits."""
        from llguidance import LLExecutor
        from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

        tokenizer, _ = _tokenizer(self._file, self._vocab_size)
        words = np.zeros((len(matchers), -(-tokenizer.vocab_size // 32)), np.int32)
        if self._num_threads == 1:  # without waiting for another thread to get a core
            for index, matcher in enumerate(matchers):
                fill_next_token_bitmask(matcher, words, index)
            return words.view(np.uint8)
        if self._executor is None:
            self._executor = LLExecutor(self._num_threads)
        numbered = [(matcher, index) for index, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._executor, numbered, words)
        return words.view(np.uint8)

    def _with_stops(self, bits: np.ndarray, chunk: Chunk, matcher: Any) -> np.ndarray:
        """Return the mask of a row of `_computed`: stop tokens where the output is complete."""
        stops, size = _sampling(chunk).stop_token_ids, self._vocab_size
        assert stops, f"request {chunk.request_id}: a grammar without a stop token"
        _, end = _tokenizer(self._file, size)
        is_complete = bool(bits[end >> 3] >> (end & 7) & 1)
        put(bits, [end], False)
        allowed = bits[: -(-size // 8)]
        allowed[-1] &= 0xFF >> (-size % 8)
        put(allowed, stops, False)
        if matcher.is_error():
            why = " ".join(matcher.get_error().split())[:200]
            log.warning("request %d ends because its grammar fails: %s", chunk.request_id, why)
            allowed[:] = 0
        elif is_complete:
            put(allowed, stops, True)
        if not allowed.any():
            put(allowed, stops[:1], True)
        return allowed

    # --- matchers -------------------------------------------------------------------------------

    def _advanced(self, chunk: Chunk) -> _State:
        """Return the state after all outputs of the chunk's request."""
        outputs, state = chunk.history[1], self._states.get(chunk.request_id)
        if state is None or not state.precedes(outputs):
            return self._rebuilt(chunk)
        self._states.move_to_end(chunk.request_id)
        state.matcher.consume_tokens(outputs[state.count :])
        state.outputs, state.count = outputs, len(outputs)
        return state

    def _rebuilt(self, chunk: Chunk) -> _State:
        from llguidance import LLMatcher, LLParserLimits

        tokenizer, _ = _tokenizer(self._file, self._vocab_size)
        limits = LLParserLimits(**GRAMMAR_LIMITS)
        matcher = LLMatcher(tokenizer, _sampling(chunk).grammar, log_level=0, limits=limits)
        outputs = chunk.history[1]
        matcher.consume_tokens(outputs)
        state = self._states[chunk.request_id] = _State(matcher, outputs, len(outputs))
        self._states.move_to_end(chunk.request_id)
        return state


def put(mask: np.ndarray, ids: Iterable[int], allowed: bool) -> None:
    """Set the bits of these tokens in a mask of `Masks`."""
    for token in ids:
        if allowed:
            mask[token >> 3] |= 1 << (token & 7)
        else:
            mask[token >> 3] &= 0xFF ^ (1 << (token & 7))


@cache
def _tokenizer(file: Path, vocab_size: int) -> tuple[Any, int]:
    """Return (llguidance's tokenizer, id of the end). Outlives parking: it takes 0.5 s to make.

    The end is a token of its own, allowed where the output is complete. With the model's end
    tokens, the text of one that is not marked as special would count as the end.
    """
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([END])
    end: int = tokenizer.token_to_id(END)  # type: ignore[assignment]
    n_vocab = max(vocab_size, tokenizer.get_vocab_size(), end + 1)
    return LLTokenizer(tokenizer.to_str(), n_vocab=n_vocab, eos_token=end), end


def _sampling(chunk: Chunk) -> Sampling:
    assert chunk.sampling is not None, f"request {chunk.request_id}: not a sampled chunk"
    return chunk.sampling
