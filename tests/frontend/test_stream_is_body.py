"""A stream and a body are two renderings of one answer, on all four routes.

Random answers with markup, cut into tokens, emits and responses at random; streams are broken off,
and continued by another API server from the id of the last event.
"""

import contextlib
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mellmpi.frontend.dialects import CHAT, COMPLETIONS, MESSAGES, NEW, RESPONSES, dialect_of
from mellmpi.frontend.outputs import outputs_of
from mellmpi.protocol import Emit, OpenCall
from tests.frontend.models_with_tools import MODELS

PARAMETERS = {"type": "object", "properties": {"x": {"type": "string"}}}
FUNCTIONS = [{"name": name, "description": "d", "parameters": PARAMETERS} for name in ("f", "g")]
USER = [{"role": "user", "content": "hi"}]
BODIES = {
    CHAT: {
        "messages": USER,
        "tools": [{"type": "function", "function": function} for function in FUNCTIONS],
    },
    COMPLETIONS: {"prompt": "hi"},
    RESPONSES: {"input": "hi", "tools": [{"type": "function", **f} for f in FUNCTIONS]},
    MESSAGES: {
        "messages": USER,
        "max_tokens": 500,
        "tools": [
            {"name": f["name"], "description": "d", "input_schema": f["parameters"]}
            for f in FUNCTIONS
        ],
    },
}
FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>\n", "\n</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"),
    *('{"name": "f", "arguments": {"x": "é"}}', '{"name": "g", "parameters": {}}', '{"name": "f"'),
    *("{", "}", "[", "]", ", ", "; ", "\n", " ", "日本👍🏽", "text", "STOP", "ST", "<", "\ufffd"),
]


class Server:
    """An API server that has a call."""

    def __init__(self, served, opened, call):
        self.tokenizer = served.tokenizers[call.model]
        self.outputs = outputs_of(call, self.tokenizer)
        self.dialect = dialect_of(opened.url)(call, self.tokenizer, opened)

    def take(self, tokens, until, reason):
        """Take tokens up to a count, as far as they are new."""
        output = self.outputs[0]
        new = tuple(tokens[len(output.tokens) : until])
        ended = reason if until == len(tokens) else None
        output.take(Emit(1, len(output.tokens), new, (), ended, ()))


def events_of(data):
    """The (id, object) of each event."""
    found, last = [], None
    for line in data.decode().splitlines():
        if line.startswith("id: "):
            last = line[4:]
        elif line.startswith("data: {"):
            found.append((last, json.loads(line[6:])))
    return found


@st.composite
def histories(draw):
    url = draw(st.sampled_from(sorted(BODIES)))
    name = draw(st.sampled_from(sorted(MODELS)))
    model = MODELS[name]
    fragments = [*FRAGMENTS, model.call("f", {"x": "}é"}), model.call("g", {}), model.between]
    text = "".join(draw(st.lists(st.sampled_from(fragments), max_size=10)))
    return {
        "url": url,
        "model": name,
        "text": text,
        "stops": draw(st.sampled_from(([], ["STOP"], ["\n\n", "ST"], ["}}"]))),
        "parallel": draw(st.booleans()),
        "reason": draw(st.sampled_from(("stop", "length"))),
        "cut": draw(st.integers(0, 3)),  # bytes of the last character that are missing
        "steps": draw(
            st.lists(st.tuples(st.integers(1, 30), st.sampled_from(("", "", "lost", "again"))))
        ),
    }


def body_of(history):
    url = history["url"]
    stops = {"stop_sequences" if url == MESSAGES else "stop": history["stops"]}
    parallel = {"parallel_tool_calls": history["parallel"]}
    if url == MESSAGES:
        choice = {"type": "auto", "disable_parallel_tool_use": not history["parallel"]}
        parallel = {"tool_choice": choice}
    elif url == COMPLETIONS:
        parallel = {"max_tokens": 500}
    if url == RESPONSES:
        stops = {}
    return {"model": history["model"], "stream": True, **BODIES[url], **stops, **parallel}


ORDINARY = {
    "url": CHAT,
    "model": "hermes",
    "stops": [],
    "parallel": True,
    "reason": "stop",
    "cut": 0,
}
TWO_CALLS = "\n".join([MODELS["hermes"].call("f", {"x": "y"})] * 2)


@settings(max_examples=400, deadline=None)
@example({**ORDINARY, "text": "text with an end that is held ", "steps": [(31, "again")]})
@example({**ORDINARY, "text": TWO_CALLS, "steps": [(100, "again"), (10, "again"), (4, "again")]})
@given(history=histories())
def test_a_stream_has_the_content_of_the_body(served, history):
    url, body = history["url"], body_of(history)
    opened = OpenCall("c0ffee", "", url, json.dumps(body).encode(), 1700, True, (1,))
    call = dialect_of(url).parse(url, body, served, "c0ffee")
    tokens = served.tokenizers[call.model].encode(history["text"])
    tokens = tokens[: len(tokens) - history["cut"]] + ([2] if history["reason"] == "stop" else [])

    whole = Server(served, opened, call)
    whole.take(tokens, len(tokens), history["reason"])
    expected = whole.dialect.body(whole.outputs)

    server = Server(served, opened, call)
    cursors = server.dialect.start((NEW,), server.outputs)
    events, done = [], 0
    for count, what in [*history["steps"], (len(tokens) + 1, "")]:
        done = min(len(tokens), done + count)
        server.take(tokens, done, history["reason"])
        new = events_of(server.dialect.new(cursors, server.outputs))
        if what and (events or new):
            # The connection breaks off in the middle of these events; perhaps the server dies, too.
            read = new[: len(new) // 2] if what == "lost" else new
            events += read
            last = events[-1][0] if events else None
            server = Server(served, opened, call)
            server.take(tokens, done, history["reason"])
            positions = (NEW,) if last is None else (int(last),)
            cursors = server.dialect.start(positions, server.outputs)
        else:
            events += new
    events += events_of(server.dialect.new(cursors, server.outputs))
    assert cursors[0].ended
    CHECKS[url](expected, [data for _, data in events])


def check_chat(body, chunks):
    message, reason = {}, None
    for chunk in chunks:
        (choice,) = chunk["choices"]
        reason = choice["finish_reason"] or reason
        for name, value in choice["delta"].items():
            if name != "tool_calls":
                message[name] = message.get(name, "") + value
                continue
            for call in value:
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({name: call[name] for name in ("id", "type", "function")})
                else:
                    assert call["index"] == len(calls) - 1
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    (choice,) = body["choices"]
    found = {name: value for name, value in choice["message"].items() if name != "refusal"}
    assert message == found | {"content": found["content"] or ""}
    assert choice["finish_reason"] == reason


def check_completions(body, chunks):
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == body["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == body["choices"][0]["finish_reason"]


def check_responses(body, events):
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    output, texts = [], {}
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(output)
                output.append(None)
            case "output_text.delta" | "reasoning_text.delta" | "function_call_arguments.delta":
                texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
            case "output_text.done" | "reasoning_text.done":
                assert texts[event["item_id"]] == event["text"]
            case "function_call_arguments.done":
                assert texts[event["item_id"]] == event["arguments"]
            case "output_item.done":
                output[event["output_index"]] = event["item"]
    assert output == body["output"] and events[-1]["response"] == body
    assert events[-1]["type"] == f"response.{body['status']}"


def check_messages(body, events):
    content, message = [], {}
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(content)
                content.append(event["content_block"])
                arguments = ""
            case "content_block_delta":
                match event["delta"]:
                    case {"text": text}:
                        content[-1]["text"] += text
                    case {"thinking": text}:
                        content[-1]["thinking"] += text
                    case {"partial_json": text}:
                        arguments += text
            case "content_block_stop" if content[-1]["type"] == "tool_use":
                with contextlib.suppress(ValueError):
                    content[-1]["input"] = json.loads(arguments)
            case "message_delta":
                message |= event["delta"] | {"usage": message["usage"] | event["usage"]}
    assert message | {"content": content} == body
    assert events[-1]["type"] == "message_stop"


CHECKS = {
    CHAT: check_chat,
    COMPLETIONS: check_completions,
    RESPONSES: check_responses,
    MESSAGES: check_messages,
}


@pytest.mark.parametrize("url", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("name", MODELS)
def test_two_calls_beside_a_text_are_found_in_every_format(served, url, name):
    model = MODELS[name]
    text = model.between.join([model.call("f", {"x": "é"}), model.call("g", {})])
    if name == "mistral":
        text = text.replace("][TOOL_CALLS][", ", ")
    if name.startswith("thinking"):
        text = f"hm\n</think>\n\n{text}"
    body = {**BODIES[url], "model": name}
    opened = OpenCall("c0ffee", "", url, json.dumps(body).encode(), 1700, False, (1,))
    call = dialect_of(url).parse(url, body, served, "c0ffee")
    server = Server(served, opened, call)
    tokens = [*served.tokenizers[name].encode(text), 2]
    server.take(tokens, len(tokens), "stop")
    answer = server.dialect.body(server.outputs)
    if url == CHAT:
        message = answer["choices"][0]["message"]
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert message["content"] is None
        assert message.get("reasoning_content") == ("hm" if name.startswith("thinking") else None)
    elif url == RESPONSES:
        calls = [
            (item["name"], item["arguments"])
            for item in answer["output"]
            if item["type"] == "function_call"
        ]
    else:
        calls = [
            (block["name"], json.dumps(block["input"]))
            for block in answer["content"]
            if block["type"] == "tool_use"
        ]
        assert answer["stop_reason"] == "tool_use"
    assert [(n, json.loads(a)) for n, a in calls] == [("f", {"x": "é"}), ("g", {})]
