"""The answer to one request while it is generated: tokens, their text and the finish reason."""

import itertools
from collections.abc import Sequence

from mellmpi.frontend.echo import Echo
from mellmpi.frontend.items import ItemLog, Markup
from mellmpi.frontend.openai import Call
from mellmpi.frontend.stops import StopStrings
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.protocol import Emit, PromptLogprob, Sampling, TokenLogprob


class Output:
    """Collects the `Emit`s of one request until `finish_reason` is set; later ones are ignored."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: Sampling,
        stops: tuple[str, ...],
        prompt: Sequence[int] = (),
        markup: Markup | None = None,
        echo: Echo | None = None,
        alone: bool = False,
    ):
        """
        markup  marks the items of the answer; None: only its text is wanted
        echo    of the prompt, which precedes the text
        alone   there is no answer: the first token is dropped, and ends it
        """
        self.echo, self._alone = echo, alone
        self.prompt_logprobs: tuple[PromptLogprob, ...] = ()  # from the second token on
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.token_bytes: list[bytes] = []  # what each token adds to the text
        self._starts: list[int] = []  # offset of each token's text, stop strings included
        self.text = ""
        self.passed: list[int] = []  # length of the final text after each token
        self.finish_reason: str | None = None
        self.log = ItemLog(markup) if markup is not None else None
        shown = markup.texts if markup is not None else ()
        self._stream = tokenizer.stream(prompt, shown) if echo is None else echo.stream
        self._length = 0  # characters so far, stop strings included
        self._stops = StopStrings(stops)
        self._stop_tokens = frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens

    def take(self, emit: Emit) -> str:
        """Add new tokens. Returns the text that is now final.

        Tokens after a stop string are dropped.
        """
        if self.finish_reason is not None:
            return ""
        assert emit.first == len(self.tokens), f"tokens out of order: {emit}"
        self.prompt_logprobs += emit.prompt_logprobs
        if self._alone:
            self.finish_reason = "length"
            return ""
        before = len(self.text)
        for index, token in enumerate(emit.tokens):
            self.tokens.append(token)
            self.logprobs += emit.logprobs[index : index + 1]
            self._starts.append(self._length)
            # The token that ends the answer is counted, but has no text.
            if token in self._stop_tokens:
                self.token_bytes.append(b"")
            else:
                self._add(self._stream.push(token))
                self.token_bytes.append(self._stream.data)
            passed = self.passed[-1] if self.passed else 0
            self.passed.append(len(self.text))
            if self.log is not None and self.log.push(self.text[passed:]):
                self.finish_reason = "stop"
            if self.finish_reason is not None:
                break
        else:
            if emit.finish_reason is not None:
                self._finish(emit.finish_reason)
        if self.finish_reason is not None and self.log is not None:
            self.log.finish(self.text[self.passed[-1] if self.passed else 0 :])
        return self.text[before:]

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.text

    @property
    def begun(self) -> bool:
        """Whether the first tokens have come, and the logprobs of the prompt with them."""
        return bool(self.tokens) or self.finish_reason is not None

    @property
    def num_final(self) -> int:
        """Number of leading tokens whose text is final: no stop string can begin in it."""
        if self.finish_reason is not None or self._length == len(self.text):
            return len(self.tokens)
        ends = itertools.chain(self._starts[1:], (self._length,))
        return sum(1 for end in ends if end <= len(self.text))

    @property
    def offsets(self) -> list[int]:
        """The offset of each token's text, in characters, and then the length of the text."""
        length = len(self.text)
        return [*(min(start, length) for start in self._starts), length]

    @property
    def token_texts(self) -> list[str]:
        """The text of each token; joined, they are the whole text.

        A character of several tokens belongs to the last of them.
        """
        return [self.text[a:b] for a, b in itertools.pairwise(self.offsets)]

    def _add(self, text: str) -> None:
        self._length += len(text)
        is_short = len(self.tokens) < self._min_tokens  # stop strings do not count yet
        self.text += text if is_short else self._stops.push(text)
        if self._stops.found:
            self.finish_reason = "stop"

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._add(self._stream.finish())
        self.text += self._stops.finish()


def outputs_of(call: Call, tokenizer: Tokenizer) -> list[Output]:
    """Return an output for each choice of a call."""
    about, outputs = call.about_prompts, []
    for index, sampling in enumerate(call.samplings):
        which = index // call.n
        prompt, echo = call.prompts[which], None
        if about.echo:
            echo = Echo(tokenizer, prompt, about.texts[which], about.alone)
        outputs.append(
            Output(tokenizer, sampling, call.stops, prompt, call.markup, echo, about.alone)
        )
    return outputs
