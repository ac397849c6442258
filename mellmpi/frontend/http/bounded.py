"""Work of unknown length in a thread, with a limit of time."""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
MOST_THREADS = 8  # at once; they share one interpreter lock with the event loop


class Overdue(BaseException):
    """Raised inside of a function that has run for too long. No handler of errors catches it."""


class Threads:
    """Runs functions beside the event loop."""

    def __init__(self, most: int = MOST_THREADS):
        self._free = asyncio.Semaphore(most)

    async def run(self, limit_s: float, function: Callable[..., T], *arguments: Any) -> T:
        """Return the result of a function. Raises its error, or TimeoutError after `limit_s`.

        A function that is late is ended at its next line of Python.
        """
        loop = asyncio.get_running_loop()
        await self._free.acquire()
        done: asyncio.Future[T] = loop.create_future()

        def finish(result: Any, error: BaseException | None) -> None:
            self._free.release()
            if done.done():
                return
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        def work() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = function(*arguments)
            except Overdue:
                error = TimeoutError()
            except BaseException as raised:
                error = raised
            loop.call_soon_threadsafe(finish, result, error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            return await asyncio.wait_for(asyncio.shield(done), limit_s)
        except TimeoutError:
            _interrupt(thread)
            done.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise


def _interrupt(thread: threading.Thread) -> None:
    identity = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(Overdue))
