"""The HTTP client: sends one request to an OpenAI server and reads its stream.

One session without a limit of connections. An event costs some 28 µs of one core if it comes alone
(36,000 events/s), 12 µs where events come faster than they are read, so that one read has several
(80,000 events/s). `bench/loadgen.py` measures both.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import aiohttp

from mellmpi.loadgen.answers import Answer, Count, Failed, Outcome, message_of
from mellmpi.loadgen.datasets import Prompt
from mellmpi.loadgen.options import SAMPLING, BenchOptions
from mellmpi.loadgen.sse import EventStream

LONGEST_S = 6 * 3600.0  # of one request
LISTING_S, CONNECTING_S = 30.0, 10.0  # of the list of models
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Unreachable(Exception):
    """Nothing answers at the URL of the server. The text says why."""


@dataclass
class Client:
    """Sends requests. `tokens` counts tokens where the server does not; None: there is no way.

    Each request has an x-request-id of its own.
    """

    session: aiohttp.ClientSession
    options: BenchOptions
    model: str
    tokens: Count | None = None
    clock: Callable[[], float] = time.perf_counter
    prefix: str = field(default_factory=lambda: f"bench-{uuid4().hex[:8]}-")
    numbers: Iterator[int] = field(default_factory=count)

    async def ask(self, prompt: Prompt, begin_s: float) -> Outcome:
        """Send a request and read its answer to the end. Failures are outcomes, too.

        begin_s  start of the run; times of the outcome are since then
        """
        payload = json.dumps(self.body(prompt)).encode()
        headers = {"x-request-id": f"{self.prefix}{next(self.numbers)}"}
        answer, start_s = Answer(), self.clock()
        try:
            await self._read(payload, headers, answer)
            outcome = answer.outcome(start_s, prompt.prompt_tokens, self.tokens)
        except Failed as error:
            reason, detail = error.reason, error.detail
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            reason, detail = described(error)
        else:
            return replace(outcome, start_s=start_s - begin_s)
        text, spent_s = "".join(answer.texts), self.clock() - start_s
        return Outcome(
            start_s - begin_s,
            prompt.prompt_tokens,
            spent_s,
            text=text,
            reason=reason,
            detail=detail,
        )

    async def _read(self, payload: bytes, headers: dict[str, str], answer: Answer) -> None:
        async with self.session.post(self.options.url, data=payload, headers=headers) as response:
            if response.status != 200:
                raise Failed(f"HTTP {response.status}", _error_text(await response.text()))
            if response.content_type == "application/json":
                answer.take(await response.text(), self.clock())  # one body, not a stream
                answer.is_done = True
                return
            stream = EventStream()
            async for piece in response.content.iter_any():
                now = self.clock()
                for data in stream.feed(piece):
                    answer.take(data, now)
            for data in stream.finish():
                answer.take(data, self.clock())

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Return the body of a request. A null in --extra-body removes a field."""
        given: dict[str, Any] = {"model": self.model}
        if self.options.is_chat:
            given["messages"] = [{"role": "user", "content": prompt.prompt}]
        else:
            given["prompt"] = prompt.prompt
        given |= {
            "max_tokens": prompt.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.options.sends_ignore_eos:
            given["ignore_eos"] = True
        given |= {name: getattr(self.options, name) for name in SAMPLING}
        given |= self.options.extra_body
        return {name: value for name, value in given.items() if value is not None}


def open_session(options: BenchOptions) -> aiohttp.ClientSession:
    """Return a session with the headers of the options. Needs a running event loop."""
    headers = {"Content-Type": "application/json"}
    if options.api_key:
        headers["Authorization"] = f"Bearer {options.api_key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=not options.insecure, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=LONGEST_S),
        headers=headers | dict(options.header),
        trust_env=urlsplit(options.server).hostname not in LOOPBACK,  # proxies
    )


async def first_model(session: aiohttp.ClientSession, options: BenchOptions) -> str | None:
    """Return the first model that the server lists; None if it lists none.

    Raises Unreachable if nothing listens.
    """
    timeout = aiohttp.ClientTimeout(total=LISTING_S, sock_connect=CONNECTING_S)
    try:
        async with session.get(f"{options.server}/v1/models", timeout=timeout) as response:
            listed = json.loads(await response.text())
            return str(listed["data"][0]["id"])
    except aiohttp.ClientConnectionError as error:
        raise Unreachable(": ".join(filter(None, described(error)))) from error
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError):
        return None


def described(error: Exception) -> tuple[str, str]:
    """Return the reason of a failed connection, alike for alike failures, and its details."""
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(
        error.os_error, ConnectionRefusedError
    ):
        return "connection refused", ""
    if isinstance(error, TimeoutError):
        return "no answer in time", ""
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return "the server closed the connection", ""
    if isinstance(error, ConnectionResetError):
        return "the server reset the connection", ""
    return type(error).__name__, " ".join(str(error).split())


def _error_text(body: str) -> str:
    try:
        return message_of(json.loads(body))
    except (ValueError, RecursionError):
        return " ".join(body.split())[:200]
