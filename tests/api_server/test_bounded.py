"""Functions in threads with a limit of time."""

import asyncio
import contextlib
import itertools

import pytest

from mellmpi.frontend.http.bounded import Threads


def loops():
    for _ in itertools.count():
        with contextlib.suppress(Exception):  # as templates and tokenizers catch errors
            int("x")


def test_results_and_errors_come_back():
    async def run():
        threads = Threads(1)
        assert await threads.run(20, divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await threads.run(20, divmod, 7, 0)
        assert await threads.run(20, divmod, 7, 2) == (3, 1)

    asyncio.run(run())


def test_what_is_late_ends_and_gives_its_place_back():
    async def run():
        threads = Threads(1)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await threads.run(0.02, loops)
        assert await asyncio.wait_for(threads.run(20, divmod, 7, 2), 20) == (3, 1)

    asyncio.run(run())


def test_a_caller_that_leaves_gives_its_place_back():
    async def run():
        threads = Threads(1)
        task = asyncio.ensure_future(threads.run(20, sum, range(10**6)))
        await asyncio.sleep(0)
        task.cancel()
        assert await asyncio.wait_for(threads.run(20, divmod, 7, 2), 20) == (3, 1)

    asyncio.run(run())
