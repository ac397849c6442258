"""Response bodies of finished answers, in OpenAI's format."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from mellmpi.frontend.echo import Echo
from mellmpi.frontend.items import Item, Reasoning, Text, merged
from mellmpi.frontend.openai import CHAT, Call
from mellmpi.frontend.outputs import Output
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.frontend.tool_calls import Arguments, CallBegin
from mellmpi.protocol import PromptLogprob, TokenLogprob

Json = dict[str, Any]


def answer_body(
    call: Call, outputs: Sequence[Output], tokenizer: Tokenizer, answer_id: str, created: int
) -> Json:
    """Return the response body of a call.

    outputs  one per choice, all finished
    created  unix time in seconds
    """
    chat = call.url == CHAT
    choices = [
        _chat_choice(index, call, output, tokenizer, answer_id)
        if chat
        else _completion_choice(index, call, output, tokenizer)
        for index, output in enumerate(outputs)
    ]
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{answer_id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": call.model,
        "choices": choices,
        "usage": usage(call, outputs),
        **(_prompt_logprobs(0, call, outputs[0], tokenizer) if chat else {}),
    }


def usage(call: Call, outputs: Sequence[Output]) -> dict[str, int]:
    """Return the token counts. A prompt with several samples counts once."""
    prompt = sum(len(tokens) for tokens in call.prompts)
    completion = sum(len(output.tokens) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _completion_choice(index: int, call: Call, output: Output, tokenizer: Tokenizer) -> Json:
    num_logprobs = call.samplings[index].num_logprobs
    logprobs = None
    if num_logprobs is not None:
        logprobs = completion_logprobs(output, tokenizer)
        if output.echo is not None:
            before = echo_logprobs(output, output.echo, num_logprobs, tokenizer)
            logprobs = {name: column + logprobs[name] for name, column in before.items()}
    return {
        "index": index,
        "text": (output.echo.text if output.echo is not None else "") + output.text,
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
        **_token_ids(index, call, output),
        **_prompt_logprobs(index, call, output, tokenizer),
    }


def _chat_choice(
    index: int, call: Call, output: Output, tokenizer: Tokenizer, answer_id: str
) -> Json:
    wanted = call.samplings[index].num_logprobs is not None
    return {
        "index": index,
        "message": _message(call, output, f"{answer_id}/{index}"),
        "logprobs": {"content": chat_logprobs(output, tokenizer)} if wanted else None,
        "finish_reason": chat_finish_reason(output),
        **_token_ids(index, call, output),
    }


def _message(call: Call, output: Output, choice_id: str) -> Json:
    message: Json = {"role": "assistant", "content": output.text, "refusal": None}
    if output.log is None or call.markup is None:
        return message
    delta = ChatDeltas(choice_id, call.markup.short_ids).next(output.log.items)
    calls = [
        {k: v for k, v in each.items() if k != "index"} for each in delta.pop("tool_calls", ())
    ]
    message |= {"content": None if calls else "", **delta}
    return message | {"tool_calls": calls} if calls else message


def chat_finish_reason(output: Output) -> str | None:
    """Return the finish reason of a chat."""
    called = output.finish_reason == "stop" and output.log is not None and output.log.has_calls
    return "tool_calls" if called else output.finish_reason


def tool_call_id(choice_id: str, number: int, prefix: str, short: bool) -> str:
    """Return the id of a tool call, the same wherever the answer is rendered."""
    digest = hashlib.sha256(f"{choice_id}/{number}".encode("utf-8", "surrogatepass")).hexdigest()
    return digest[:9] if short else prefix + digest[:24]


class ChatDeltas:
    """Renders items as deltas of a chat's message, one after the other."""

    def __init__(self, choice_id: str, short_ids: bool, num_calls: int = 0):
        """`num_calls`: tool calls in the deltas before the first one"""
        self._choice_id, self._short_ids, self._num_calls = choice_id, short_ids, num_calls

    def next(self, items: Sequence[Item]) -> Json:
        """Return the delta of the next items."""
        delta: Json = {}
        calls: list[Json] = []
        for item in merged(items):
            match item:
                case Text(text):
                    delta["content"] = delta.get("content", "") + text
                case Reasoning(text):
                    delta["reasoning_content"] = delta.get("reasoning_content", "") + text
                case CallBegin(name):
                    calls.append(self._begin(name))
                case Arguments(text) if calls:
                    calls[-1]["function"]["arguments"] += text
                case Arguments(text):
                    number = self._num_calls - 1
                    calls.append({"index": number, "function": {"arguments": text}})
        return delta | {"tool_calls": calls} if calls else delta

    def _begin(self, name: str) -> Json:
        number = self._num_calls
        self._num_calls += 1
        return {
            "index": number,
            "id": tool_call_id(self._choice_id, number, "call_", self._short_ids),
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }


def _token_ids(index: int, call: Call, output: Output) -> Json:
    if not call.return_token_ids:
        return {}
    return {
        "token_ids": list(output.tokens),
        "prompt_token_ids": list(call.prompts[index // call.n]),
    }


def completion_logprobs(output: Output, tokenizer: Tokenizer) -> Json:
    """Return four lists with one entry per token. The tokens joined are the text of the answer.

    Offsets are in the text with the echo of the prompt, if there is one.
    """
    texts, begin = output.token_texts, len(output.echo.text) if output.echo is not None else 0
    rows = list(zip(output.tokens, texts, output.logprobs, strict=True))
    return {
        "tokens": texts,
        "token_logprobs": [_finite(logprob) for _, _, (logprob, _, _) in rows],
        "top_logprobs": [_alternatives(*row, tokenizer) for row in rows],
        "text_offset": [begin + offset for offset in output.offsets[:-1]],
    }


def echo_logprobs(output: Output, echo: Echo, num_logprobs: int, tokenizer: Tokenizer) -> Json:
    """Return `completion_logprobs` of the prompt: null for its first token, which follows none."""
    texts = echo.texts
    rows = [_with(num_logprobs, row) for row, _ in output.prompt_logprobs]
    following = list(zip(echo.tokens[1:], texts[1:], rows, strict=True))
    return {
        "tokens": texts,
        "token_logprobs": [None, *(_finite(logprob) for _, _, (logprob, _, _) in following)],
        "top_logprobs": [None, *(_alternatives(*row, tokenizer) for row in following)],
        "text_offset": echo.offsets,
    }


def _with(num_top: int, row: TokenLogprob) -> TokenLogprob:
    """Return a row with its `num_top` likeliest alternatives; the worker may report more."""
    return row[0], row[1][:num_top], row[2][:num_top]


def _prompt_logprobs(index: int, call: Call, output: Output, tokenizer: Tokenizer) -> Json:
    """Return the field `prompt_logprobs` in the form of vLLM, if it is asked for.

    A list: null for the first token; for each other one its logprob and those of its alternatives,
    by token id.
    """
    num_top = call.about_prompts.num_logprobs
    if num_top is None:
        return {}
    tokens = call.prompts[index // call.n][1:]
    rows = zip(tokens, output.prompt_logprobs, strict=True)
    return {"prompt_logprobs": [None, *(_ranked(t, row, num_top, tokenizer) for t, row in rows)]}


def _ranked(token: int, scored: PromptLogprob, num_top: int, tokenizer: Tokenizer) -> Json:
    row, rank = scored
    values = {token: (_finite(row[0]), rank)}
    for place, (other, value) in enumerate(_top(_with(num_top, row)), start=1):
        values.setdefault(other, (value, place))
    return {
        str(i): {"logprob": value, "rank": place, "decoded_token": tokenizer.token_bytes.label(i)}
        for i, (value, place) in values.items()
    }


def _alternatives(token: int, text: str, row: TokenLogprob, tokenizer: Tokenizer) -> Json:
    """Return logprobs by token text: of the token itself and of its most likely alternatives.

    Alternatives with a text that occurs already are named by their ids.
    """
    found = {text: _finite(row[0])}
    for other, value in _top(row):
        if other != token:
            label = tokenizer.token_bytes.label(other)
            found[f"token_id:{other}" if label in found else label] = value
    return found


def chat_logprobs(output: Output, tokenizer: Tokenizer) -> list[Json]:
    """Return one object per token, with its most likely alternatives. The bytes joined are the
    text of the answer."""
    return [
        {
            **_entry(token, row[0], data, tokenizer),
            "top_logprobs": [
                _entry(i, value, data if i == token else tokenizer.token_bytes[i], tokenizer)
                for i, value in _top(row)
            ],
        }
        for token, data, row in zip(output.tokens, output.token_bytes, output.logprobs, strict=True)
    ]


def _top(row: TokenLogprob) -> list[tuple[int, float]]:
    return [(token, _finite(value)) for token, value in zip(row[1], row[2], strict=True)]


def _finite(logprob: float) -> float:
    """Replace infinity and NaN, which JSON lacks, by OpenAI's value for an impossible token."""
    return logprob if -9999.0 < logprob < math.inf else -9999.0


def _entry(token: int, logprob: float, data: bytes, tokenizer: Tokenizer) -> Json:
    return {
        "token": tokenizer.token_bytes.label(token),
        "logprob": _finite(logprob),
        "bytes": list(data),
    }
