"""The answer to one request as it grows: tokens, their text, and why it ended."""

from mellmpi.front.stops import StopStrings
from mellmpi.front.tokenizer import Tokenizer
from mellmpi.protocol import Emit, Sampling, TokenLogprob


class Output:
    """Fed with the `Emit`s of one request until `finish_reason` is set; deaf from then on."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, stops: tuple[str, ...]):
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._stream = tokenizer.stream()
        self._stops = StopStrings(stops)
        self._stop_tokens = frozenset(sampling.stop_token_ids)

    def take(self, emit: Emit) -> str:
        """Add new tokens; the text that is certain now. Tokens after a stop string are dropped."""
        if self.finish_reason is not None:
            return ""
        assert emit.first == len(self.tokens), f"tokens out of order: {emit}"
        before = len(self.text)
        for index, token in enumerate(emit.tokens):
            self.tokens.append(token)
            self.logprobs += emit.logprobs[index : index + 1]
            # A token that ends the answer is counted, but is no part of its text.
            if token not in self._stop_tokens:
                self._add(self._stream.push(token))
            if self._stops.found:
                return self.text[before:]
        if emit.finish_reason is not None:
            self._finish(emit.finish_reason)
        return self.text[before:]

    def _add(self, text: str) -> None:
        self.text += self._stops.push(text)
        if self._stops.found:
            self.finish_reason = "stop"

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._add(self._stream.finish())
        self.text += self._stops.finish()
