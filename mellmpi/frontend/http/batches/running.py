"""A batch that this API server runs: its requests on their way to rank 0, their tokens back."""

import asyncio
import contextlib
import logging
import time
import uuid
from dataclasses import replace
from typing import Any

from mellmpi.files import Unwritable
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.http.batches.store import BatchRecord, Store
from mellmpi.frontend.http.batches.work import Failed, Work
from mellmpi.frontend.http.bounded import Threads
from mellmpi.frontend.http.link import Link
from mellmpi.frontend.openai import LIMIT, Call, parse
from mellmpi.frontend.served import ServedModels
from mellmpi.protocol import Cancel, Emit, OpenCall, Rejected, Request, Submit

log = logging.getLogger(__name__)
MOST_OPEN = 64  # requests of a batch at rank 0
LAST = LIMIT + 1  # priority: every request of a client that waits goes first
REST_S = 0.02  # between two rounds, so that one takes the tokens of many requests
LOOK_EVERY_S = 0.5  # for a client that cancels, and a server that takes requests again
RETRY_S = (0.1, 30.0)  # least and most wait before a request that was refused is sent again
FULL_DISK_S = 5.0  # between two tries to record the end of a batch
FOREVER_S = 1e6


def unwritable(error: OSError | Unwritable) -> Failed:
    """Return the end of a batch for an error of the disk, without paths of the server."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    return Failed("unwritable", text or "the disk cannot be written")


class RunningBatch:
    """Run one batch to its end. Cancelling `run` leaves it to another API server."""

    def __init__(
        self, link: Link, store: Store, threads: Threads, record: BatchRecord, served: ServedModels
    ):
        self._link, self._threads, self._record = link, threads, record
        self._loop = asyncio.get_running_loop()
        self._work = Work(store, record, served, self._parse)
        self._open: dict[int, Request] = {}  # id at rank 0 -> request of the job
        self._ids: dict[int, int] = {}  # id of the job -> id at rank 0
        self._begun: set[int] = set()  # ids of the job with a token
        self._refused: dict[int, Request] = {}  # id of the job -> request that waits for a retry
        self._events: list[Emit | Rejected] = []  # with ids of the job
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Answer the rest of the batch, and record its end."""
        errors: tuple[dict[str, Any], ...] = ()
        try:
            await self._in_thread(self._work.begin)
            status = await self._answer()
        except Failed as error:
            status, errors = "failed", (error.entry,)
        except (OSError, Unwritable) as error:
            status, errors = "failed", (unwritable(error).entry,)
        except Exception as error:
            log.exception("batch %s failed", self._record.id)
            status, errors = "failed", (Failed("internal_error", repr(error)).entry,)
        self._drop_all()
        await self._end(status, errors)
        self._work.close()

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await self._threads.run(FOREVER_S, function, *arguments)

    async def _answer(self) -> str:
        """Return "completed", or why the batch ends before."""
        while True:
            self._news.clear()
            events, self._events = self._events, []
            is_ready = self._link.state.state == "ready"
            room = MOST_OPEN - len(self._open) - len(self._refused) if is_ready else 0
            done = await self._in_thread(self._work.round, events, room)
            for cancel in done.cancels:
                self._cancel(cancel)
            if done.stop or done.is_done:
                return done.stop if not done.is_done else "completed"
            for request in done.requests:
                self._submit(request)
            await asyncio.sleep(REST_S)
            if not done.requests:
                await self._next_news()

    async def _next_news(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), LOOK_EVERY_S)

    async def _end(self, status: str, errors: tuple[dict[str, Any], ...]) -> None:
        while True:
            try:
                await self._in_thread(self._work.end, status, errors)
                return
            except (OSError, Unwritable) as error:
                log.error("batch %s cannot be ended: %s", self._record.id, error)
                if status != "failed":
                    status, errors = "failed", (unwritable(error).entry,)
            await asyncio.sleep(FULL_DISK_S)

    def _parse(self, url: str, body: dict[str, Any], *rest: Any) -> Call:
        """Check a line, in a thread with a limit of time. Called in the thread of the batch."""
        if url != self._record.endpoint:
            raise BadRequest(f"url must be the batch's endpoint, {self._record.endpoint}", "url")
        bounded = self._link.bounded(parse, url, body, *rest)
        return asyncio.run_coroutine_threadsafe(bounded, self._loop).result()

    # --- requests at rank 0 ----------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        """Send a request under a fresh id. If this process dies, rank 0 cancels it."""
        sent = replace(request, id=self._link.new_id(), priority=LAST)
        self._open[sent.id], self._ids[request.id] = request, sent.id
        self._link.takers[sent.id] = self._take
        call_id, created = uuid.uuid4().hex, int(time.time())
        self._link.send(OpenCall(call_id, self._record.owner, "", b"", created, False, (sent.id,)))
        self._link.send(Submit(sent))

    def _take(self, event: Emit | Rejected) -> None:
        request = self._open[event.request_id]
        is_last = isinstance(event, Rejected) or event.finish_reason is not None
        if is_last:
            self._forget(event.request_id)
        if isinstance(event, Emit):
            self._begun.add(request.id)
        elif event.retry_after_s > 0 and request.id not in self._begun:
            self._refused[request.id] = request
            wait_s = min(max(event.retry_after_s, RETRY_S[0]), RETRY_S[1])
            self._loop.call_later(wait_s, self._retry, request.id)
            return
        if is_last:
            self._begun.discard(request.id)
        self._events.append(replace(event, request_id=request.id))
        self._news.set()

    def _retry(self, request_id: int) -> None:
        if (request := self._refused.pop(request_id, None)) is not None:
            self._submit(request)

    def _cancel(self, cancel: Cancel) -> None:
        self._refused.pop(cancel.request_id, None)
        sent_id = self._ids.get(cancel.request_id)
        if sent_id is not None:
            self._forget(sent_id)
            self._link.send(Cancel(sent_id, cancel.reason))

    def _forget(self, sent_id: int) -> None:
        request = self._open.pop(sent_id)
        del self._link.takers[sent_id]
        del self._ids[request.id]

    def _drop_all(self) -> None:
        for request in list(self._open.values()):
            self._cancel(Cancel(request.id, "gone"))
        self._refused.clear()
