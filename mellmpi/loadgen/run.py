"""One run: sends each request at its time, and collects the outcomes.

The generator watches itself: how late requests are sent, and how late its event loop is. Both are
part of every TTFT that it measures.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from mellmpi.loadgen.answers import Outcome
from mellmpi.loadgen.datasets import Prompt

BEAT_S = 0.02  # time between two looks at the lag of the event loop


class Asking(Protocol):
    """What a run needs of a client: see `Client.ask`."""

    def __call__(self, prompt: Prompt, begin_s: float) -> Awaitable[Outcome]: ...


@dataclass
class Run:
    """What a run has measured. Times are in seconds."""

    outcomes: list[Outcome] = field(default_factory=list)  # in the order of the end
    duration_s: float = 0.0
    send_lag_s: list[float] = field(default_factory=list)  # sending − arrival, of each request
    loop_lag_s: list[float] = field(default_factory=list)
    sent: int = 0
    is_interrupted: bool = False

    @property
    def in_flight(self) -> int:
        """Requests that have been sent and have not ended."""
        return self.sent - len(self.outcomes)


@dataclass
class Generator:
    """Sends requests at their times, at most `max_concurrency` at once."""

    ask: Asking
    max_concurrency: int | None = None
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep
    on_change: Callable[[Run], None] = lambda _: None

    async def run(
        self, prompts: Sequence[Prompt], arrival_s: Sequence[float], stop: asyncio.Event
    ) -> Run:
        """Send all requests and wait for their answers, or until `stop` is set.

        arrival_s  of each prompt, ascending
        """
        run = Run()
        begin_s = self.clock()
        sending = asyncio.create_task(self._send(prompts, arrival_s, begin_s, run))
        beating = asyncio.create_task(self._beat(run))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            run.duration_s = self.clock() - begin_s
            run.is_interrupted = not sending.done()
            others = (sending, beating, stopping)
            for task in others:
                task.cancel()
            ends = await asyncio.gather(*others, return_exceptions=True)
        if isinstance(ends[0], Exception):
            raise ends[0]
        return run

    async def _send(
        self, prompts: Sequence[Prompt], arrival_s: Sequence[float], begin_s: float, run: Run
    ) -> None:
        room = asyncio.Semaphore(self.max_concurrency) if self.max_concurrency else nullcontext()

        async def one(prompt: Prompt) -> None:
            async with room:
                run.sent += 1
                self.on_change(run)
                run.outcomes.append(await self.ask(prompt, begin_s))
                self.on_change(run)

        async with asyncio.TaskGroup() as group:
            for prompt, at_s in zip(prompts, arrival_s, strict=True):
                if (wait_s := begin_s + at_s - self.clock()) > 0:
                    await self.sleep(wait_s)
                run.send_lag_s.append(self.clock() - begin_s - at_s)
                group.create_task(one(prompt))

    async def _beat(self, run: Run) -> None:
        """Measure how late the event loop wakes a task."""
        while True:
            due_s = self.clock() + BEAT_S
            await self.sleep(BEAT_S)
            run.loop_lag_s.append(max(0.0, self.clock() - due_s))
