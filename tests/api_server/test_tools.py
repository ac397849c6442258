"""Tools, structured output and reasoning over HTTP, with the clients that users have."""

import json

import anthropic
import httpx2 as httpx
import openai
import pytest

from mellmpi.frontend import Tokenizer
from tests.frontend.models_with_tools import MODELS

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "Weather of a city", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
ASK = [{"role": "user", "content": "How is the weather in Köln?"}]
CALL = {"city": "Köln"}
NAMES = sorted(MODELS)


@pytest.fixture(scope="module")
def client(tool_cell):
    return openai.OpenAI(base_url=f"{tool_cell.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(tool_cell):
    return anthropic.Anthropic(base_url=tool_cell.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def raw(tool_cell):
    with httpx.Client(base_url=tool_cell.url, timeout=30, trust_env=False) as client:
        yield client


def answer_of(name):
    text = MODELS[name].call("weather", CALL)
    return f"I think\n</think>\n\n{text}" if name.startswith("thinking") else text


# --- chat ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_calls_a_tool_and_takes_its_result(
    client, tool_cell, model_directories, script, name
):
    given = {"model": name, "tools": [TOOL], "seed": script(name, answer_of(name))}
    answer = client.chat.completions.create(messages=ASK, **given).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == CALL

    said = answer.message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain today"}
    given["seed"] = script(
        name, "so</think>Take a coat" if name.startswith("thinking") else "Take a coat"
    )
    final = client.chat.completions.create(messages=[*ASK, said, result], **given).choices[0]
    assert final.message.content == "Take a coat" and final.finish_reason == "stop"
    tokens = list(tool_cell.requests[-1].prompt)
    prompt = Tokenizer.load(model_directories[name]).decode(tokens)
    assert '"city"' in prompt and "Köln" in prompt and "rain today" in prompt
    assert '"arguments": "' not in prompt, "templates get arguments as an object"
    assert "Weather of a city" in prompt


def test_a_streamed_call_arrives_in_pieces(client, script, tool_cell, monkeypatch):
    monkeypatch.setattr(tool_cell, "token_s", 0.01)  # faster ones share an event
    given = {"model": "hermes", "tools": [TOOL], "seed": script("hermes", answer_of("hermes"))}
    calls, reasons = [], []
    for chunk in client.chat.completions.create(messages=ASK, stream=True, **given):
        (choice,) = chunk.choices
        reasons.append(choice.finish_reason)
        assert not choice.delta.content
        calls += choice.delta.tool_calls or []
    assert calls[0].id and calls[0].function.name == "weather"
    assert all(call.index == 0 for call in calls) and len(calls) > 3
    assert json.loads("".join(call.function.arguments for call in calls)) == CALL
    assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}


def test_a_call_that_is_cut_off_ends_for_its_length(client, script):
    given = {"model": "hermes", "tools": [TOOL], "seed": script("hermes", answer_of("hermes"))}
    answer = client.chat.completions.create(messages=ASK, max_tokens=50, **given).choices[0]
    assert answer.finish_reason == "length" and answer.message.tool_calls


def test_reasoning_is_apart_from_the_answer(client, script):
    given = {"model": "thinking", "seed": script("thinking", "Hm <b>\n</think>\n\nFine.")}
    message = client.chat.completions.create(messages=ASK, **given).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm <b>", "Fine.")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_required_call_has_a_grammar(client, tool_cell, script, name, choice):
    given = {"model": name, "tools": [TOOL], "seed": script(name, answer_of(name))}
    answer = client.chat.completions.create(messages=ASK, tool_choice=choice, **given)
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    assert "weather" in tool_cell.requests[-1].sampling.grammar


def test_one_call_at_most_if_they_may_not_be_parallel(client, tool_cell, script):
    text = "\n".join([answer_of("hermes")] * 3)
    given = {"model": "hermes", "tools": [TOOL], "seed": script("hermes", text)}
    for parallel, calls in ((True, 3), (False, 1)):
        answer = client.chat.completions.create(
            messages=ASK, parallel_tool_calls=parallel, **given
        ).choices[0]
        assert len(answer.message.tool_calls) == calls and answer.finish_reason == "tool_calls"
    assert tool_cell.cancelled[-1][1] == "stop"


def test_no_tools_are_called_if_none_may_be(client, tool_cell, script):
    given = {"model": "hermes", "tools": [TOOL], "seed": script("hermes", "no")}
    answer = client.chat.completions.create(messages=ASK, tool_choice="none", **given)
    assert answer.choices[0].message.tool_calls is None
    assert b"weather" not in bytes(t - 3 for t in tool_cell.requests[-1].prompt if 3 <= t < 259)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"tools": [{"type": "web_search"}]}, "only tools of type function"),
        ({"tools": ["f"]}, "only tools of type function"),
        ({"tools": {}}, "tools must be a list"),
        ({"tools": [{"type": "function", "function": {"name": "a\nb"}}]}, "function.name must be"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]},
            "x is not supported",
        ),
        ({"tools": [TOOL, TOOL]}, "two functions named weather"),
        ({"tools": [TOOL] * 600}, "at most 512"),
        ({"tool_choice": "required"}, "tool_choice asks for"),
        ({"tools": [TOOL], "tool_choice": "weather"}, "tool_choice must be"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice asks for",
        ),
        ({"tools": [TOOL], "guided_regex": "a+"}, "guided_regex cannot be used with tools"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "strict": True, "parameters": {"not": {}}},
                    }
                ]
            },
            "not",
        ),
        ({"messages": [*ASK, {"role": "tool", "content": "x"}]}, "tool_call_id must be text"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "messages[0].tool_calls[0] must be",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "content must be text"),
    ],
)
def test_tools_that_are_wrong_are_refused_by_name(raw, body, says):
    response = raw.post("/v1/chat/completions", json={"model": "hermes", "messages": ASK, **body})
    assert response.status_code == 400 and says in response.json()["error"]["message"]


# --- Responses -----------------------------------------------------------------------------------

FLAT = {"type": "function", "strict": False, **FUNCTION}


def test_a_response_calls_a_tool_and_takes_its_result(client, script):
    given = {"model": "hermes", "tools": [FLAT]}
    seed = {"seed": script("hermes", f"Let me look.\n{answer_of('hermes')}")}
    first = client.responses.create(input=ASK, **given, extra_body=seed)
    assert first.status == "completed" and first.output_text == "Let me look."
    message, call = first.output
    assert message.type == "message" and json.loads(call.arguments) == CALL
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    seed = {"seed": script("hermes", "Rain.")}
    items = [*ASK, *(item.model_dump(exclude_none=True) for item in first.output), result]
    final = client.responses.create(input=items, **given, extra_body=seed, instructions="Be short")
    assert final.output_text == "Rain." and final.instructions == "Be short"
    assert final.usage.total_tokens == final.usage.input_tokens + final.usage.output_tokens


def test_a_response_streams_numbered_events(client, script):
    seed = {"seed": script("thinking", f"Hm\n</think>\nOk\n{answer_of('hermes')}")}
    with client.responses.stream(
        model="thinking", input="x", tools=[FLAT], extra_body=seed
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "Ok" and final.output[0].content[0].text == "Hm"
    assert final.usage.output_tokens_details.reasoning_tokens == 5  # each byte and the mark


def test_a_response_can_be_continued_and_read_again(raw, script):
    seed = script("hermes", "one two three")
    body = {"model": "hermes", "input": "x", "seed": seed, "stream": True}
    events = stream_of(raw.post("/v1/responses", json=body))
    response_id = events[0]["response"]["id"]
    for after in (0, 3, len(events) - 2):
        again = raw.get(f"/v1/responses/{response_id}?stream=true&starting_after={after}")
        assert stream_of(again) == events[after + 1 :]
    assert raw.get(f"/v1/responses/{response_id}").json() == events[-1]["response"]
    assert raw.get("/v1/responses/resp_unknown").status_code == 404
    for wrong in ("starting_after=x", "stream=maybe"):
        assert raw.get(f"/v1/responses/{response_id}?{wrong}").status_code == 400


def stream_of(response):
    return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]


def test_a_response_that_is_cut_off_is_incomplete(client, script):
    seed = {"seed": script("hermes", "one two three")}
    answer = client.responses.create(
        model="hermes", input="x", max_output_tokens=3, extra_body=seed
    )
    assert answer.status == "incomplete" and answer.output_text == "one"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"


def test_a_response_with_a_schema_has_a_grammar(client, tool_cell, script):
    text = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}}
    for name, before in (("hermes", ""), ("thinking", "Hm</think>")):
        seed = {"seed": script(name, before + json.dumps(CALL))}
        answer = client.responses.create(model=name, input="x", text=text, extra_body=seed)
        assert json.loads(answer.output_text) == CALL
        assert "city" in tool_cell.requests[-1].sampling.grammar


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "input must be text"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"input": "x", "inputs": 1}, "did you mean 'input'"),
        ({"input": [{"type": "image"}]}, "input[0]: the type 'image' is not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "'input_image'"),
        ({"input": [3]}, "input must be a list of objects"),
        ({"input": "x", "max_output_tokens": 10**7}, "max_output_tokens 10000000"),
        ({"input": "x", "tools": [{"type": "mcp"}]}, "tools[0]: the type 'mcp'"),
        ({"input": "x", "text": {"verbosity": "low"}}, "text.verbosity is not supported"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"input": "x", "truncation": "auto"}, "truncation is not supported"),
    ],
)
def test_responses_refuse_by_name(raw, body, says):
    response = raw.post("/v1/responses", json={"model": "hermes", **body})
    assert response.status_code == 400 and says in response.json()["error"]["message"]


# --- Messages ------------------------------------------------------------------------------------

CLAUDE_TOOL = {"name": "weather", "description": "Weather of a city", "input_schema": SCHEMA}


def test_a_message_uses_a_tool_and_takes_its_result(claude, script):
    given = {"model": "mistral", "tools": [CLAUDE_TOOL], "max_tokens": 200}
    seed = {"seed": script("mistral", f"Let me look.{answer_of('mistral')}")}
    first = claude.messages.create(messages=ASK, **given, extra_body=seed)
    text, use = first.content
    assert first.stop_reason == "tool_use" and text.text == "Let me look." and use.input == CALL
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
    turns = [*ASK, {"role": "assistant", "content": first.content}]
    turns.append({"role": "user", "content": [result, {"type": "text", "text": "So?"}]})
    seed = {"seed": script("mistral", "Rain. STOP it")}
    final = claude.messages.create(
        messages=turns, system="Be short", stop_sequences=["STOP"], **given, extra_body=seed
    )
    assert final.content[0].text == "Rain. " and final.stop_sequence == "STOP"
    assert final.stop_reason == "stop_sequence" and final.usage.input_tokens > 10


def test_a_message_streams_its_blocks(claude, script):
    seed = {"seed": script("thinking", f"Hm\n</think>\nOk\n{answer_of('hermes')}")}
    with claude.messages.stream(
        model="thinking", messages=ASK, tools=[CLAUDE_TOOL], max_tokens=200, extra_body=seed
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[0].thinking == "Hm" and final.content[2].input == CALL
    assert final.stop_reason == "tool_use" and final.usage.output_tokens > 20


def test_tokens_of_a_message_are_counted(claude, raw, script):
    given = {"model": "hermes", "messages": ASK, "system": "Be kind"}
    count = claude.messages.count_tokens(**given).input_tokens
    seed = {"seed": script("hermes", "a")}
    message = claude.messages.create(**given, max_tokens=5, extra_body=seed)
    assert message.usage.input_tokens == count and message.stop_reason == "end_turn"
    assert claude.messages.count_tokens(**given, tools=[CLAUDE_TOOL]).input_tokens > count


def test_errors_name_the_fields_of_their_own_body(raw):
    body = {"model": "hermes", "input": "x" * 200_000}
    assert raw.post("/v1/responses", json=body).json()["error"]["param"] == "input"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "max_tokens is required"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 5, "messages": []}, "at least one message"),
        ({"max_tokens": 5, "messages": [{"role": "system", "content": "x"}]}, "user or assistant"),
        ({"max_tokens": 5, "messages": [*ASK, {"role": "assistant", "content": "x"}]}, "last"),
        (
            {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "image",
        ),
        ({"max_tokens": 5, "tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"max_tokens": 5, "tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"max_tokens": 5, "tool_choice": {"type": "all"}}, "tool_choice.type"),
        ({"max_tokens": 5, "thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking"),
        ({"max_tokens": 5, "mcp_servers": [{}]}, "mcp_servers is not supported"),
    ],
)
def test_messages_refuse_by_name_in_their_form(raw, body, says):
    response = raw.post("/v1/messages", json={"model": "hermes", "messages": ASK, **body})
    answer = response.json()
    assert response.status_code == 400 and says in answer["error"]["message"]
    assert answer["type"] == "error" and answer["error"]["type"] == "invalid_request_error"


def test_errors_of_messages_have_their_form(raw):
    given = {"model": "other", "messages": ASK, "max_tokens": 5}
    assert raw.post("/v1/messages", json=given).json()["error"]["type"] == "not_found_error"
    assert raw.post("/v1/messages", content=b"{").json()["type"] == "error"
    assert raw.get("/v1/messages").json()["type"] == "error"
