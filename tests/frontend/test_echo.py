"""Echoed prompts and their logprobs, in bodies and streams, in the forms of OpenAI and vLLM."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.frontend import ServedModels
from mellmpi.frontend.answers import answer_body
from mellmpi.frontend.dialects import NEW, dialect_of
from mellmpi.frontend.echo import Echo
from mellmpi.frontend.openai import CHAT, COMPLETIONS, parse
from mellmpi.frontend.outputs import outputs_of
from mellmpi.protocol import Emit, OpenCall
from tests.frontend.tokenizers_of_each_kind import kinds

X, Y = 90, 91  # tokens of "x" and "y"


def row(token):
    """Logprobs of a token that is the third, and of the three likeliest."""
    return -float(token), (X, Y, token), (-0.125, -0.25, -float(token))


class Answers:
    """The answers to one call; the model answers with the given tokens."""

    def __init__(self, tokenizer, model, url=COMPLETIONS, **body):
        self.tokenizer = tokenizer
        self.call = parse(url, body, ServedModels.of((model, tokenizer)), "me")
        self.outputs = outputs_of(self.call, tokenizer)

    def emit(self, choice, first, tokens, reason):
        sampling = self.call.samplings[choice]
        prompt = self.call.prompts[choice // self.call.n]
        logprobs = tuple(map(row, tokens)) if sampling.num_logprobs is not None else ()
        scored = ()
        if sampling.num_prompt_logprobs is not None and not first:
            scored = tuple((row(token), 3) for token in prompt[1:])
        self.outputs[choice].take(Emit(choice, first, tuple(tokens), logprobs, reason, scored))

    def body(self, *answers):
        for choice, tokens in enumerate(answers):
            self.emit(choice, 0, tokens, "length")
        body = answer_body(self.call, self.outputs, self.tokenizer, "17", 1234)
        return json.loads(json.dumps(body, allow_nan=False))

    def stream(self, tokens, pieces):
        """The chunks of the only choice, whose tokens come in pieces of these lengths."""
        opened = OpenCall("17", "", COMPLETIONS, b"", 1234, True, (1,))
        dialect = dialect_of(COMPLETIONS)(self.call, self.tokenizer, opened)
        cursors, first = dialect.start([NEW], self.outputs), 0
        events = [dialect.new(cursors, self.outputs)]
        for length in (*pieces, len(tokens)):
            end = min(len(tokens), first + length)
            self.emit(0, first, tokens[first:end], "length" if end == len(tokens) else None)
            events.append(dialect.new(cursors, self.outputs))
            first = end
            if end == len(tokens):
                break
        lines = b"".join(events).decode().splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


@pytest.fixture
def answers(tokenizer, model):
    return lambda **body: Answers(tokenizer, model, **body)


def test_the_prompt_precedes_the_answer(answers, tokenizer):
    body = answers(prompt=["ab", "c"], n=2, echo=True).body(*map(tokenizer.encode, "wxyz"))
    assert [c["text"] for c in body["choices"]] == ["abw", "abx", "cy", "cz"]
    assert all(c["logprobs"] is None and "prompt_logprobs" not in c for c in body["choices"])
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_logprobs_cover_prompt_and_answer(answers, tokenizer):
    b, c = tokenizer.encode("bc")
    [choice] = answers(prompt="ab", echo=True, logprobs=2).body([c])["choices"]
    best = {"x": -0.125, "y": -0.25}
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -b, -c],
        "top_logprobs": [None, {"b": -b, **best}, {"c": -c, **best}],
        "text_offset": [0, 1, 2],
    }


def test_without_an_answer_only_the_prompt_is_there(answers, tokenizer):
    [b] = tokenizer.encode("b")
    body = answers(prompt="ab", echo=True, logprobs=0, max_tokens=0).body([7])
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -b]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


def test_a_harness_sums_the_logprobs_of_a_continuation(answers, tokenizer):
    """As lm_eval's `local-completions` reads the answer: one token is generated and cut off."""
    prompt = tokenizer.encode("context continued")
    [choice] = answers(prompt=[prompt], echo=True, logprobs=1, max_tokens=1).body([2])["choices"]
    values, top = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
    begin = len("context")
    assert sum(values[begin:-1]) == -sum(prompt[begin:])
    assert all(isinstance(entry, dict) for entry in top[begin:-1])
    assert len(values) == len(top) == len(prompt) + 1


@pytest.mark.parametrize("body", [dict(prompt="ab"), dict(prompt="ab", echo=True, logprobs=3)])
def test_prompt_logprobs_have_the_form_of_vllm(answers, tokenizer, body):
    [b] = tokenizer.encode("b")
    [choice] = answers(prompt_logprobs=1, **body).body([7])["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            str(b): {"logprob": -b, "rank": 3, "decoded_token": "b"},
            str(X): {"logprob": -0.125, "rank": 1, "decoded_token": "x"},
        },
    ]


def test_prompt_logprobs_of_a_chat_are_beside_its_choices(answers, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    body = answers(url=CHAT, messages=messages, n=2, prompt_logprobs=0).body([7], [8])
    prompt = tokenizer.encode_chat(messages)
    first, *others = body["prompt_logprobs"]
    assert first is None and [int(*entry) for entry in others] == prompt[1:]
    assert not any("prompt_logprobs" in choice for choice in body["choices"])


def test_a_character_cut_by_the_end_of_the_prompt_is_completed_by_the_answer(answers, tokenizer):
    first, second = tokenizer.encode("é")
    a = tokenizer.encode("a")
    [whole] = answers(prompt=[*a, first], echo=True, logprobs=0).body([second, *a])["choices"]
    assert (whole["text"], whole["logprobs"]["tokens"]) == ("aéa", ["a", "", "é", "a"])
    assert whole["logprobs"]["text_offset"] == [0, 1, 1, 2]
    [broken] = answers(prompt=[first], echo=True).body(a)["choices"]
    [alone] = answers(prompt=[first], echo=True, max_tokens=0, logprobs=0).body(a)["choices"]
    assert (broken["text"], alone["text"]) == ("\ufffda", "\ufffd")
    assert alone["logprobs"]["tokens"] == ["\ufffd"]


def test_a_special_token_has_the_text_that_the_prompt_has(answers, tokenizer):
    text = "<|im_end|>a<|im_end|>"
    [choice] = answers(prompt=text, echo=True, logprobs=0, max_tokens=0).body([7])["choices"]
    assert choice["text"] == text
    assert choice["logprobs"]["tokens"] == ["<|im_end|>", "a", "<|im_end|>"]
    ids = tokenizer.encode(text)
    [choice] = answers(prompt=ids, echo=True, max_tokens=0).body([7])["choices"]
    assert choice["text"] == "a"


@given(
    prompt=st.lists(st.integers(0, 511), min_size=1, max_size=20),
    tokens=st.lists(st.integers(0, 511), min_size=1, max_size=12),
    pieces=st.lists(st.integers(1, 5)),
    options=st.fixed_dictionaries({}, optional={"logprobs": st.just(2), "max_tokens": st.just(0)}),
)
def test_a_stream_is_its_body_and_the_tokens_joined_are_the_text(
    tokenizer, model, prompt, tokens, pieces, options
):
    body = dict(prompt=prompt, echo=True, stop_token_ids=[2], ignore_eos=True, **options)
    [choice] = Answers(tokenizer, model, **body).body(tokens)["choices"]
    if "max_tokens" in options:
        tokens = tokens[:1]
    stream = Answers(tokenizer, model, **body, stream=True)
    chunks = [chunk["choices"][0] for chunk in stream.stream(tokens, pieces)]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]
    if "logprobs" not in options:
        return
    columns = choice["logprobs"]
    joined = {name: [] for name in columns}
    for chunk in chunks:
        for name in columns:
            joined[name] += chunk["logprobs"][name]
    assert joined == columns
    ends = [*columns["text_offset"][1:], len(choice["text"])]
    spans = zip(columns["text_offset"], ends, columns["tokens"], strict=True)
    assert all(choice["text"][begin:end] == text for begin, end, text in spans)
    assert columns["text_offset"][0] == 0


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "text", ["née naïve", "日本語 テキスト です", "👍🏽 😀 ok", "</s>x = [1]</s>"]
)
def test_the_echo_of_a_text_is_the_text_that_its_tokens_have(kind, text):
    """The text itself where the tokenizer keeps all of it."""
    ids = kind.ours.encode(text)
    echo = Echo(kind.ours, ids, text, alone=True)
    assert "".join(echo.texts) == echo.text
    plain = kind.ours.decode(ids)
    assert echo.text.replace("</s>", "") == plain
    if plain == text.replace("</s>", ""):
        assert echo.text == text
