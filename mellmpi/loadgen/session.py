"""A session with one server: found, waited for, warmed up, then measured."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import aiohttp
import numpy as np

from mellmpi.config import UsageError
from mellmpi.files import visible
from mellmpi.loadgen.client import Client, Unreachable, first_model, open_session
from mellmpi.loadgen.datasets import Prompt
from mellmpi.loadgen.made_up import Vocabulary
from mellmpi.loadgen.options import BenchOptions
from mellmpi.loadgen.run import Generator, Run

READY_EVERY_S = 1.0


class Session:
    """The requests of a run, and the server that they are sent to."""

    def __init__(
        self,
        options: BenchOptions,
        prompts: Sequence[Prompt],
        arrival_s: np.ndarray,
        vocabulary: Vocabulary | None,
        say: Callable[[str], None],
    ):
        self._options, self._prompts, self._arrival_s = options, prompts, arrival_s
        self._vocabulary, self._say = vocabulary, say
        self.model = options.served_model_name or options.model or ""

    async def run(self, stop: asyncio.Event, on_change: Callable[[Run], None]) -> Run:
        """Send all requests until `stop` is set. UsageError if the server cannot be reached."""
        async with open_session(self._options) as session:
            if not await _unless(stop, self._find_server(session)):
                return Run(is_interrupted=True)
            client = self._client(session)
            if not await _unless(stop, self._prepare(client)):
                return Run(is_interrupted=True)
            generator = Generator(client.ask, self._options.max_concurrency, on_change=on_change)
            return await generator.run(self._prompts, self._arrival_s.tolist(), stop)

    def _client(self, session: aiohttp.ClientSession) -> Client:
        count = self._vocabulary.count if self._vocabulary else None
        return Client(session, self._options, self.model, count)

    async def _find_server(self, session: aiohttp.ClientSession) -> None:
        """Wait until the server listens, and ask it for the name of its model if none is given."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._options.ready_check_timeout_sec
        while True:
            try:
                listed = await first_model(session, self._options)
                break
            except Unreachable as error:
                if loop.time() >= until_s:
                    raise UsageError(self._advice(str(error))) from error
            await asyncio.sleep(READY_EVERY_S)
        if not self.model:
            if listed is None:
                raise UsageError(
                    f"{self._options.server}/v1/models lists no model; name one with --model"
                )
            self.model = listed

    async def _prepare(self, client: Client) -> None:
        """Wait until a request is answered, if asked for, and send those that warm up."""
        options, loop = self._options, asyncio.get_running_loop()
        first = self._prompts[0]
        until_s = loop.time() + options.ready_check_timeout_sec
        while options.ready_check_timeout_sec:
            outcome = await client.ask(first, 0.0)
            if not outcome.reason:
                break
            if loop.time() >= until_s:
                raise UsageError(
                    f"{visible(options.url)} answers no request within "
                    f"--ready-check-timeout-sec: {visible(outcome.error)}"
                )
            await asyncio.sleep(READY_EVERY_S)
        if options.num_warmups:
            self._say(f"{options.num_warmups} requests to warm up")
            prompts = [first] * options.num_warmups
            generator = Generator(client.ask, options.max_concurrency)
            await generator.run(prompts, [0.0] * len(prompts), asyncio.Event())

    def _advice(self, why: str) -> str:
        return (
            f"no server answers at {visible(self._options.server)} ({visible(why)}). Start it, or "
            "give its address:  --base-url http://HOST:PORT\n"
            "  --ready-check-timeout-sec 600 waits for a server that is still starting"
        )


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Await `work` and return True; cancel it and return False if `stop` is set before its end."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    is_done = working.done()
    working.cancel()
    stopping.cancel()
    await asyncio.gather(working, stopping, return_exceptions=True)
    if is_done:
        working.result()
    return is_done
