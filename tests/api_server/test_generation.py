"""Answers over HTTP: bodies, streams, errors, and the clients that users have."""

import json
import re

import openai
import pytest

from tests.api_server.serving_cell import BUSY, REFUSED, expected_text

PROMPT = list(range(40, 50))


@pytest.fixture(scope="module")
def client(cell):
    return openai.OpenAI(base_url=f"{cell.url}/v1", api_key="none", max_retries=0)


def events_of(response):
    """Yield (id, data) of a stream."""
    last_id = None
    for line in response.iter_lines():
        if line.startswith("id: "):
            last_id = line[4:]
        elif line.startswith("data: "):
            yield last_id, line[6:]


def test_a_completion(http, byte_tokenizer):
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    answer = http.post("/v1/completions", json=body).json()
    choice = answer["choices"][0]
    assert choice["text"] == expected_text(byte_tokenizer, PROMPT, 30)
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 30, "total_tokens": 40}
    assert answer["id"].startswith("cmpl-") and answer["model"] == "tiny"


def test_a_stream_has_the_text_of_the_body(http, byte_tokenizer):
    body = {"prompt": PROMPT, "max_tokens": 50, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(response))
    assert events[-1][1] == "[DONE]"
    chunks = [json.loads(data) for _, data in events[:-1]]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == expected_text(byte_tokenizer, PROMPT, 50)
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + [
        "length"
    ]
    assert int(events[-2][0]) == 51


def test_a_harness_gets_the_logprobs_of_a_prompt(client, byte_tokenizer):
    given = {"model": "tiny", "prompt": [PROMPT], "echo": True, "logprobs": 1, "temperature": 0}
    text = byte_tokenizer.decode(PROMPT)
    [alone] = client.completions.create(**given, max_tokens=0).choices
    assert (alone.text, alone.finish_reason) == (text, "length")
    assert alone.logprobs.token_logprobs == [None] + [-0.25] * 9
    [one] = client.completions.create(**given, max_tokens=1).choices
    assert one.logprobs.token_logprobs == [None] + [-0.25] * 9 + [-0.5]
    assert one.logprobs.text_offset == list(range(11))
    [ranked] = client.completions.create(
        model="tiny", prompt=PROMPT, extra_body={"prompt_logprobs": 0}
    ).choices
    assert ranked.prompt_logprobs[1][str(PROMPT[1])]["rank"] == 1


def test_an_echo_streams_before_the_answer(client):
    given = {"model": "tiny", "prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 30}
    [body] = client.completions.create(**given, temperature=0).choices
    chunks = [
        chunk.choices[0] for chunk in client.completions.create(**given, temperature=0, stream=True)
    ]
    assert "".join(chunk.text for chunk in chunks) == body.text
    values = [value for chunk in chunks for value in chunk.logprobs.token_logprobs]
    assert values == body.logprobs.token_logprobs


def test_usage_is_null_in_all_chunks_but_the_last(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == 12 and chunks[-1].choices == []
    assert chunks[0].choices[0].delta.role == "assistant"


def test_choices_of_one_call_stream_side_by_side(client):
    given = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "n": 3, "seed": 5}
    body = client.completions.create(**given)
    texts = [""] * 3
    for chunk in client.completions.create(**given, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in body.choices]
    assert len(set(texts)) == 3


def test_a_stop_string_ends_the_answer_and_the_request(cell, client, byte_tokenizer):
    text = expected_text(byte_tokenizer, byte_tokenizer.encode("abc"), 40)
    stop = text[20:23]
    given = {
        "model": "tiny",
        "prompt": "abc",
        "max_tokens": 100_0,
        "temperature": 0,
        "stop": [stop],
    }
    body = client.completions.create(**given)
    streamed = "".join(c.choices[0].text for c in client.completions.create(**given, stream=True))
    assert body.choices[0].text == streamed == text[: text.index(stop)]
    assert body.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("chat", [True, False])
def test_logprobs_of_a_stream_are_those_of_the_body(http, chat):
    url = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"max_tokens": 25, "seed": 3, "stop": ["zz"]}
    if chat:
        body |= {
            "messages": [{"role": "user", "content": "x"}],
            "logprobs": True,
            "top_logprobs": 1,
        }
    else:
        body |= {"prompt": "x", "logprobs": 1}
    whole = http.post(url, json=body).json()["choices"][0]["logprobs"]
    with http.stream("POST", url, json={**body, "stream": True}) as response:
        chunks = [json.loads(data) for _, data in events_of(response) if data != "[DONE]"]
    parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    joined = {name: [entry for part in parts for entry in part[name]] for name in whole}
    assert joined == whole


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b'{"prompt": "a", "prompt": "b"}', 400, "occurs twice"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "NaN is no JSON number"),
        (b'{"prompt": "a", "temperature": 1e400}', 400, "too large"),
        (b'{"prompt": "a", "n": 1000000000}', 400, "n must be"),
        (b'{"prompt": "\\ud800"}', 400, "lone surrogate"),
        (b'{"prompt": "a", "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, "too deeply"),
        (b'{"prompt": "a", "model": "other"}', 404, "does not exist"),
        (b'{"prompt": "\xff"}', 400, "not UTF-8"),
        (b'{"prompt": "a", "stop": ' + json.dumps(["x"] * 10_000).encode() + b"}", 400, "stop"),
    ],
)
def test_errors_say_what_is_wrong(http, body, status, says):
    response = http.post("/v1/completions", content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert says in error["message"] and {"message", "type", "param", "code"} == error.keys()


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_of_the_scheduler_is_an_error_with_a_status(http, stream):
    body = {"prompt": [40] * REFUSED, "stream": stream}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 503
    assert "it needs more" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_an_overloaded_server_says_when_to_come_again(http, stream):
    body = {"prompt": "a", "priority": BUSY, "stream": stream}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 429 and response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "overloaded"


def test_state_routes(http):
    assert http.get("/live").status_code == http.get("/ready").status_code == 200
    assert http.get("/health").json()["state"] == "ready"
    assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["tiny"]
    assert http.get("/v1/models/tiny").json()["max_model_len"] == 100_000
    assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert http.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert http.get("/version").json()["version"]


def test_documents_need_no_other_host(http):
    page = http.get("/docs").text
    assets = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert assets and all(asset.startswith("/") for asset in assets)
    assert all(http.get(asset).status_code == 200 for asset in assets)
    assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]


def test_the_configuration_of_a_tokenizer(http):
    found = http.get("/tokenizer_info").json()
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "message" in found["chat_template"]
    assert http.get("/tokenizer_info?model=other").status_code == 404


def test_tokenize_and_detokenize(http, byte_tokenizer):
    found = http.post("/tokenize", json={"prompt": "héllo"}).json()
    assert found["tokens"] == byte_tokenizer.encode("héllo") and found["count"] == len(
        found["tokens"]
    )
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "héllo"}
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_a_wrong_method_is_told_all_that_are_right(http):
    for path, allowed in (("/v1/files", "GET, POST"), ("/v1/files/x", "DELETE, GET")):
        response = http.put(path)
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
