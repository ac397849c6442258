"""Clients that people have, unchanged, against a server whose model follows grammars.

Those that are not installed are skipped; `pip install -e '.[clients]'` has them all.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.api_server.serving_cell import ServingCell

NODE = Path(__file__).parent / "node"
ASK = [{"role": "user", "content": "How is the weather in Köln?"}]
ANSWER_LEN = 12  # tokens, each of one character


class Weather(BaseModel):
    city: str
    rainy: bool


@pytest.fixture(scope="module")
def base(byte_directory):
    """URL of a server with the model `tiny`, which ends its answers by itself."""
    with ServingCell(byte_directory, max_model_len=8000, answer_len=ANSWER_LEN) as cell:
        yield cell.url


@pytest.fixture(scope="module")
def client(base):
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(base):
    return anthropic.Anthropic(base_url=base, api_key="none", max_retries=0)


# --- openai --------------------------------------------------------------------------------------


def test_openai_lists_models(client):
    (model,) = client.models.list()
    assert client.models.retrieve(model.id).id == "tiny"


def test_openai_parses_structured_output(client):
    given = {"model": "tiny", "messages": ASK}
    answer = client.chat.completions.parse(response_format=Weather, **given)
    assert isinstance(answer.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(response_format=Weather, **given) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed
    assert client.responses.parse(model="tiny", input=ASK, text_format=Weather).output_parsed


def test_openai_parses_the_arguments_of_tools(client):
    tool = openai.pydantic_function_tool(Weather)
    given = {"model": "tiny", "messages": ASK, "tools": [tool], "tool_choice": "required"}
    (call,) = client.chat.completions.parse(**given).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)


def test_openai_streams_a_response(client):
    with client.responses.stream(model="tiny", input="hi") as stream:
        deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text != ""


def test_openai_asks_from_an_event_loop(base):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none") as client:
            given = {"model": "tiny", "messages": ASK, "stream": True}
            stream = await client.chat.completions.create(**given)
            return [chunk async for chunk in stream]

    assert asyncio.run(ask())[-1].choices[0].finish_reason == "stop"


# --- anthropic -----------------------------------------------------------------------------------


def test_anthropic_lists_models(claude):
    assert [model.id for model in claude.models.list()] == ["tiny"]


def test_anthropic_chats_and_streams(claude):
    given = {"model": "tiny", "max_tokens": 100, "messages": ASK}
    message = claude.messages.create(**given)
    assert message.stop_reason == "end_turn" and len(message.content[0].text) == ANSWER_LEN
    with claude.messages.stream(**given) as stream:
        assert len("".join(stream.text_stream)) == ANSWER_LEN


def test_anthropic_parses_structured_output(claude):
    given = {"model": "tiny", "max_tokens": 100, "messages": ASK}
    assert claude.messages.parse(output_format=Weather, **given).parsed_output


# --- langchain-openai ----------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(base, responses):
    chat_openai = pytest.importorskip("langchain_openai").ChatOpenAI
    model = chat_openai(
        base_url=f"{base}/v1", api_key="none", model="tiny", use_responses_api=responses
    )
    assert len(model.invoke("hi").text) == ANSWER_LEN
    assert len("".join(chunk.text for chunk in model.stream("hi"))) == ANSWER_LEN
    assert isinstance(model.with_structured_output(Weather).invoke("hi"), Weather)
    answer = model.bind_tools([Weather], tool_choice="required").invoke("hi")
    assert Weather(**answer.tool_calls[0]["args"])


# --- llm -----------------------------------------------------------------------------------------


@pytest.fixture
def llm(base, tmp_path):
    """Run the command `llm` with a model that a user has added."""
    pytest.importorskip("llm")
    entry = {"model_id": "tiny", "model_name": "tiny", "api_base": f"{base}/v1"}
    entry |= {"supports_schema": True, "supports_tools": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    settings = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none", "LLM_LOAD_PLUGINS": ""}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    return run


@pytest.mark.parametrize("options", [(), ("--no-stream",)])
def test_llm_chats(llm, options):
    assert len(llm("-m", "tiny", *options, "hi").rstrip("\n")) == ANSWER_LEN


def test_llm_takes_a_schema_and_tools(llm):
    assert json.loads(llm("-m", "tiny", "--schema", "city, rainy bool", "hi")).keys() == {
        "city",
        "rainy",
    }
    function = 'def weather(city: str) -> str:\n    "Weather of a city"\n    return "rain"'
    assert llm("-m", "tiny", "--functions", function, "hi").strip()


# --- openai-agents -------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
@pytest.mark.parametrize("streamed", [False, True])
def test_agents_call_a_tool_and_answer(base, api, streamed):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def weather(city: str) -> str:
        """Weather of a city"""
        asked.append(city)
        return "rain"

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none") as client:
            agent = agents.Agent(
                name="Frog",
                instructions="Answer.",
                model=getattr(agents, api)("tiny", openai_client=client),
                tools=[weather],
                model_settings=agents.ModelSettings(tool_choice="required"),
            )
            if not streamed:
                return (await agents.Runner.run(agent, "Köln?")).final_output
            run = agents.Runner.run_streamed(agent, "Köln?")
            async for _ in run.stream_events():
                pass
            return run.final_output

    assert len(asyncio.run(ask())) == ANSWER_LEN and len(asked) == 1


@pytest.mark.parametrize("api", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def test_agents_answer_with_an_object(base, api):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none") as client:
            model = getattr(agents, api)("tiny", openai_client=client)
            agent = agents.Agent(name="Frog", model=model, output_type=Weather)
            return (await agents.Runner.run(agent, "Köln?")).final_output

    assert isinstance(asyncio.run(ask()), Weather)


# --- instructor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_instructor_makes_objects(client, mode):
    instructor = pytest.importorskip("instructor")
    model = instructor.from_openai(client, mode=instructor.Mode[mode])
    given = {"model": "tiny", "messages": ASK, "response_model": Weather, "max_retries": 0}
    assert isinstance(model.chat.completions.create(**given), Weather)
    *_, last = model.chat.completions.create_partial(**given)
    assert last.city is not None and last.rainy is not None


def test_instructor_makes_objects_of_messages(claude):
    instructor = pytest.importorskip("instructor")
    model = instructor.from_anthropic(claude)
    given = {"model": "tiny", "max_tokens": 100, "messages": ASK, "max_retries": 0}
    assert isinstance(model.messages.create(response_model=Weather, **given), Weather)


# --- Node ----------------------------------------------------------------------------------------


@pytest.mark.skipif(
    shutil.which("node") is None or not (NODE / "node_modules").is_dir(),
    reason="needs node, and `npm install` in tests/api_server/node",
)
@pytest.mark.parametrize("name", ["openai", "ai_chat", "ai_responses"])
def test_clients_of_node(base, name):
    found = subprocess.run(
        ["node", "clients.mjs", name, f"{base}/v1"],
        cwd=NODE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stdout + found.stderr
