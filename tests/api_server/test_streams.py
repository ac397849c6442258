"""Streams that outlive their client's connection or their API server; clients that leave."""

import json
import threading
import time

import httpx2 as httpx
import pytest

from tests.api_server.serving_cell import ServingCell, expected_text
from tests.api_server.test_generation import PROMPT, events_of

BODY = {"prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": True}


@pytest.fixture
def slow(byte_directory):
    with ServingCell(byte_directory, token_s=0.004) as cell:
        yield cell


def client_of(cell):
    return httpx.Client(base_url=cell.url, timeout=30, trust_env=False)


def until(condition, limit_s=10.0):
    """Wait until a condition holds."""
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it has not happened"
        time.sleep(0.005)


def is_replaced(cell, process):
    """Whether another process has taken the place of this one."""
    return 0 in cell.front._servers and cell.server.process is not process


def read(events, most=None):
    """Return the text, the id of the stream and of the last event, of the first `most` events."""
    text, last = "", None
    for last, data in events:
        if data == "[DONE]":
            return text, last, True
        text += json.loads(data)["choices"][0]["text"]
        if most is not None and int(last) >= most:
            break
    return text, last, False


def test_a_killed_server_loses_and_repeats_no_token(slow, byte_tokenizer):
    with client_of(slow) as client:
        with client.stream("POST", "/v1/completions", json=BODY) as response:
            stream_id = response.headers["x-stream-id"]
            events = events_of(response)  # kept: without it the client would close the connection
            text, last, _ = read(events, most=40)
            slow.server.kill()
        headers = {"last-event-id": last}
        with client.stream("GET", f"/v1/streams/{stream_id}", headers=headers) as response:
            rest, _, done = read(events_of(response))
    assert done and text + rest == expected_text(byte_tokenizer, PROMPT, 400)
    assert slow.submitted == 1 and slow.cancelled == []


def test_an_ended_stream_can_be_read_again_from_any_token(slow, byte_tokenizer):
    expected = expected_text(byte_tokenizer, PROMPT, 30)
    with client_of(slow) as client:
        body = {**BODY, "max_tokens": 30}
        with client.stream("POST", "/v1/completions", json=body) as response:
            stream_id = response.headers["x-stream-id"]
            assert read(events_of(response))[0] == expected
        for start in (0, 7, 29, 30):
            headers = {"last-event-id": str(start)}
            with client.stream("GET", f"/v1/streams/{stream_id}", headers=headers) as response:
                assert read(events_of(response))[0] == expected[start:]
        assert client.get("/v1/streams/unknown").status_code == 404
        wrong = {"last-event-id": "3,4"}
        assert client.get(f"/v1/streams/{stream_id}", headers=wrong).status_code == 400


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("held", [True, False], ids=["queued", "decoding"])
def test_a_client_that_leaves_ends_its_request(slow, stream, held):
    if held:
        slow.hold.set()
    connected = threading.Event()

    def leave_early():
        with httpx.Client(base_url=slow.url, timeout=0.5, trust_env=False) as client:
            request = client.build_request(
                "POST", "/v1/completions", json={**BODY, "max_tokens": 90_000, "stream": stream}
            )
            try:
                connected.set()
                response = client.send(request, stream=True)
                next(response.iter_lines())
                response.close()
            except httpx.TimeoutException:
                pass

    thread = threading.Thread(target=leave_early)
    thread.start()
    connected.wait()
    until(lambda: slow.submitted == 1)
    thread.join()
    until(lambda: [reason for _, reason in slow.cancelled] == ["gone"], 2.0)
    assert not slow.open


def test_bodies_end_with_their_server_and_streams_wait_for_their_clients(slow):
    answers = []

    def ask(stream):
        with client_of(slow) as client:
            try:
                answers.append(client.post("/v1/completions", json={**BODY, "stream": stream}))
            except httpx.HTTPError as error:
                answers.append(error)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    until(lambda: slow.submitted == 2)
    slow.server.kill()
    for thread in threads:
        thread.join()
    assert all(isinstance(answer, httpx.HTTPError) for answer in answers)
    until(lambda: len(slow.cancelled) == 1)


def test_a_restarted_server_takes_new_requests(slow, byte_tokenizer):
    with client_of(slow) as client:
        for _ in range(2):
            body = {**BODY, "max_tokens": 5, "stream": False}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["choices"][0]["text"] == expected_text(byte_tokenizer, PROMPT, 5)
            process = slow.server.process
            process.kill()
            until(lambda killed=process: is_replaced(slow, killed))
