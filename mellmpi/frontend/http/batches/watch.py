"""Finds the batches that nobody runs, and runs them."""

import asyncio
import logging
import os
from pathlib import Path

from mellmpi.frontend.http.batches.running import RunningBatch
from mellmpi.frontend.http.batches.store import BatchRecord, Store
from mellmpi.frontend.http.bounded import Threads
from mellmpi.frontend.http.link import Link
from mellmpi.frontend.served import ServedModels

log = logging.getLogger(__name__)
MOST_RUNNING = 4  # batches in one API server; others wait for their end, the oldest first
LOOK_EVERY_S = 0.5
LOOK_FOR_S = 1e6  # a slow disk delays this task alone


class BatchWatch:
    """Runs unfinished batches of the directory, also those that another API server has left."""

    def __init__(self, link: Link, directory: str):
        self._link, self._directory = link, directory
        self._threads = Threads()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._ended: set[str] = set()
        self._problem = ""  # of the last look

    async def run(self) -> None:
        """Look for batches until the task is cancelled."""
        if not self._directory:
            return
        served = await self._link.wait_started()
        while True:
            try:
                await self._look(served)
                self._problem = ""
            except Exception as error:  # a disk may come back
                if self._problem != (problem := repr(error)):
                    log.exception("--batch-dir %s", self._directory)
                self._problem = problem
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, served: ServedModels) -> None:
        if self._link.state.state != "ready" or len(self._running) >= MOST_RUNNING:
            return
        store = await self._threads.run(LOOK_FOR_S, Store, Path(self._directory))
        for record in await self._threads.run(LOOK_FOR_S, store.unfinished, self._ended):
            if record.id in self._running or len(self._running) >= MOST_RUNNING:
                continue
            if locked := await self._threads.run(LOOK_FOR_S, store.lock, record.id):
                self._start(store, *locked, served)

    def _start(self, store: Store, lock: int, record: BatchRecord, served: ServedModels) -> None:
        batch = RunningBatch(self._link, store, self._threads, record, served)
        task = self._running[record.id] = asyncio.create_task(batch.run())

        def end(ended: asyncio.Task[None]) -> None:
            del self._running[record.id]
            if not ended.cancelled():  # else its thread may still write: the process ends
                os.close(lock)

        task.add_done_callback(end)
