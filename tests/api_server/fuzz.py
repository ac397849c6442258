"""Mutated bodies to every POST route: `python -m tests.api_server.fuzz 10000 [SEED]`.

No body may crash the server, get a status of 5xx, leave a call open, or be answered with 200 if it
is nonsense for certain: no JSON object, or a field of a wrong type.
"""

import copy
import json
import random
import re
import sys
import tempfile
from pathlib import Path

import httpx2 as httpx

from mellmpi.config import HttpConfig
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.http.app import make_app
from mellmpi.frontend.http.batches.store import FileRecord, Store, record_of
from mellmpi.frontend.strict_json import json_object
from mellmpi.models.random_model import write_byte_tokenizer
from tests.api_server.serving_cell import ServingCell
from tests.api_server.test_streams import until

COMMON = {
    "model": "tiny",
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "n": 2,
    "seed": 1,
    "stop": ["q", "zz"],
    "stream": False,
    "ignore_eos": False,
    "stop_token_ids": [3],
    "presence_penalty": 0.1,
}
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
EXAMPLES = {  # path -> a body that is answered with 200
    "/v1/completions": COMMON | {"prompt": "abc", "logprobs": 1},
    "/v1/chat/completions": COMMON
    | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "chat_template_kwargs": {"a": 1}},
    "/v1/responses": {"model": "tiny", "input": "hi", "max_output_tokens": 4, "stream": False},
    "/v1/messages": {"model": "tiny", "messages": MESSAGES[:1], "max_tokens": 4, "stream": False},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": MESSAGES[:1]},
    "/v1/batches": {
        "input_file_id": f"file-{'0' * 32}",
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        "metadata": {"a": "b"},
    },
    "/tokenize": {"model": "tiny", "prompt": "abc"},
    "/detokenize": {"model": "tiny", "tokens": [40, 41]},
    "/v1/cluster/requests/{request_id}/migrate": {"worker": 1},
    "/v1/cluster/loglevel": {"level": "INFO"},
}
NUMBER = (int, float)
TYPES = {  # field -> types of its values, beside null
    "model": str,
    "max_tokens": int,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": int,
    "n": int,
    "seed": int,
    "stop": (str, list),
    "stream": bool,
    "prompt": (str, list),
    "messages": list,
    "tokens": list,
    "input": (str, list),
}
NONSENSE = [
    -1,
    0,
    2**31,
    2**64,
    10**400,
    -(10**30),
    0.5,
    1e308,
    True,
    False,
    None,
    "",
    "\x00",
    "\n",
    "../../etc/passwd",
    "\ud800",
    "x" * 5000,
    "{{ 7 * 7 }}",
    [],
    {},
    [[]],
    [None],
    [{}],
    {"a": [1]},
    [-1],
    [10**9],
    ["x"] * 300,
    [TOOL | {"function": {"name": "a\nb"}}],
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}},
]
NAMES = ["", "x", "tools", "tool_choice", "response_format", "echo", "best_of", "priority"]
NAMES += ["stream_options", "logit_bias", "min_tokens", "user", "metadata", *TYPES]


def places(value, path=()):
    """Every place in a JSON value, as a path."""
    yield path
    children = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for name, child in children:
        yield from places(child, (*path, name))


def put(body, path, value):
    """The body with another value at this place."""
    if not path:
        return value
    body = copy.deepcopy(body)
    parent = body
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = value
    return body


def mutated(body, rng):
    """The bytes of a body with one to three changes."""
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(4)
        if kind == 0 and isinstance(body, dict):
            body = {**body, rng.choice(NAMES): rng.choice(NONSENSE)}
        elif kind == 1 and isinstance(body, dict) and body:
            body = {k: v for k, v in body.items() if k != rng.choice(sorted(body))}
        else:
            body = put(body, rng.choice(list(places(body))), rng.choice(NONSENSE))
    data = json.dumps(body).encode()
    return damaged(data, rng) if rng.random() < 0.3 else data


def damaged(data, rng):
    """Bytes with a piece cut out, doubled, overwritten or nested."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.randint(1, 12))
    piece = {
        0: b"",
        1: data[start:end] * 2,
        2: rng.randbytes(end - start),
        3: b"[" * 5000,
        4: rng.choice(
            [b"NaN", b"1e999", b"-", b'"', b"\\ud800", b"\xff", b"\x00", b"/**/", b"0x1"]
        ),
    }[rng.randrange(5)]
    return data[:start] + piece + data[end:]


def is_nonsense(path, data):
    """Whether this route must refuse this body."""
    try:
        body = json_object(data)
    except BadRequest:
        return True
    return any(
        body[name] is not None
        and (not isinstance(body[name], types) or (type(body[name]) is bool and types is not bool))
        for name, types in TYPES.items()
        if name in body and name in EXAMPLES.get(path, ())
    )


def check(response, path, data):
    """Raise AssertionError if this answer is wrong."""
    status = response.status_code
    assert 200 <= status < 500, f"status {status}: {response.text[:300]}"
    wrong = path in EXAMPLES and is_nonsense(path, data)  # other routes take no body
    assert status != 200 or not wrong, f"nonsense is answered: {response.text[:300]}"
    if response.headers["content-type"].startswith("text/event-stream"):
        assert status == 200 and "data:" in response.text
    elif status >= 400:
        assert response.json()["error"]["message"]
    else:
        response.json()


def url_of(path, rng=None):
    """The path with values for its parameters; mostly wrong ones if `rng` is given."""
    values = ["1", "-1", "0", "x", "%00", "..", "9" * 30] if rng else ["1"]
    return re.sub(r"\{.*?\}", lambda _: rng.choice(values) if rng else "1", path)


def with_batches(directory):
    """The configuration of a server with the file that EXAMPLES name."""
    store = Store(Path(directory))
    file_id = EXAMPLES["/v1/batches"]["input_file_id"]
    store.contents(file_id).write_bytes(b'{"custom_id": "1"}\n')
    named = {"id": file_id, "owner": "", "filename": "", "purpose": "batch", "num_bytes": 0}
    store.publish(record_of(FileRecord, **named))
    return HttpConfig(port=0, batch_dir=directory)


def run(directory, count, seed):
    """Send so many bodies; the numbers of answers by path and status."""
    posts = [r.path for r in make_app(None).routes if "POST" in getattr(r, "methods", ())]
    answers = {}
    given = {"tokens_a_step": 50, "max_model_len": 300}
    with (
        tempfile.TemporaryDirectory() as batches,
        ServingCell(directory, config=with_batches(batches), **given) as cell,
    ):
        cell.front.questions["loglevel"] = lambda **_: ""
        with httpx.Client(base_url=cell.url, timeout=60, trust_env=False) as client:
            for path in posts:
                given = client.post(url_of(path), json=EXAMPLES.get(path, {}))
                assert given.status_code == 200 or path not in EXAMPLES, given.text
            process = cell.server.process
            for number in range(seed, seed + count):
                rng = random.Random(number)
                path = rng.choice(posts)
                data = mutated(EXAMPLES.get(path, {}), rng)
                response = client.post(url_of(path, rng), content=data)
                try:
                    check(response, path, data)
                except Exception as error:
                    raise AssertionError(f"seed {number}, {path}, {data[:2000]!r}") from error
                found = (path, response.status_code)
                answers[found] = answers.get(found, 0) + 1
        until(lambda: not cell.open and not cell.front._calls.num_open)
        assert cell.server.process is process and process.poll() is None, "the server has died"
    return answers


def main():
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as name:
        write_byte_tokenizer(512, Path(name))
        for (path, status), number in sorted(run(Path(name), count, seed).items()):
            sys.stdout.write(f"{path} {status}: {number}\n")


if __name__ == "__main__":
    main()
