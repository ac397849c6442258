"""Finished answers have OpenAI's format."""

import itertools
import json

import pytest

from mellmpi.frontend import ServedModels
from mellmpi.frontend.answers import answer_body
from mellmpi.frontend.openai import CHAT, COMPLETIONS, parse
from mellmpi.frontend.outputs import Output
from mellmpi.protocol import Emit


@pytest.fixture
def answer(tokenizer, model):
    """(url, body, [(text, logprob rows)]) -> the body of the answer."""

    def build(url, body, texts, reason="length"):
        call = parse(url, body, ServedModels.of((model, tokenizer)), "me")
        outputs = []
        for request, (text, rows) in zip(call.requests(itertools.count()), texts, strict=True):
            output = Output(tokenizer, request.sampling, call.stops)
            output.take(Emit(request.id, 0, tuple(tokenizer.encode(text)), tuple(rows), reason, ()))
            outputs.append(output)
        body = answer_body(call, outputs, tokenizer, "17", 1234)
        return json.loads(json.dumps(body, allow_nan=False))

    return build


def test_a_completion(answer):
    body = {"prompt": ["ab", "c"], "n": 2}
    assert answer(COMPLETIONS, body, [("w", ()), ("xx", ()), ("y", ()), ("z", ())]) == {
        "id": "cmpl-17",
        "object": "text_completion",
        "created": 1234,
        "model": "tiny",
        "choices": [
            {"index": i, "text": text, "logprobs": None, "finish_reason": "length"}
            for i, text in enumerate(["w", "xx", "y", "z"])
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }


def test_a_chat(answer, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    length = len(tokenizer.encode_chat(messages))
    assert answer(CHAT, {"messages": messages}, [("yes", ())], "stop") == {
        "id": "chatcmpl-17",
        "object": "chat.completion",
        "created": 1234,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "yes", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": length,
            "completion_tokens": 3,
            "total_tokens": length + 3,
        },
    }


def test_logprobs_of_a_completion(answer, tokenizer):
    a, b = tokenizer.encode("ab")
    rows = [(-0.5, (a, b), (-0.5, -2.0)), (-9.0, (a,), (float("-inf"),))]
    body = answer(COMPLETIONS, {"prompt": "x", "logprobs": 2}, [("ab", rows)])
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -9.0],
        "top_logprobs": [{"a": -0.5, "b": -2.0}, {"a": -9999.0, "b": -9.0}],
        "text_offset": [0, 1],
    }


def test_logprobs_of_a_chat(answer):
    """é is two tokens of one byte each."""
    rows = [(-0.5, (2,), (-0.25,)), (-1.0, (), ())]
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
    content = answer(CHAT, body, [("é", rows)])["choices"][0]["logprobs"]["content"]
    end = {"token": "<|im_end|>", "logprob": -0.25, "bytes": []}
    assert content == [
        {"token": r"\xc3", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": [end]},
        {"token": r"\xa9", "logprob": -1.0, "bytes": [0xA9], "top_logprobs": []},
    ]


def test_token_ids_are_returned_on_request(answer, tokenizer):
    body = {"prompt": ["ab", "c"], "return_token_ids": True}
    choices = answer(COMPLETIONS, body, [("w", ()), ("xy", ())])["choices"]
    assert choices[1]["token_ids"] == tokenizer.encode("xy")
    assert choices[1]["prompt_token_ids"] == tokenizer.encode("c")
