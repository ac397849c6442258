"""The access log: one JSON object a line, written by a thread of its own."""

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)
MOST_WAITING = 10_000  # lines that a slow disk, or a terminal that stands still, keeps waiting
STDERR = 2


class AccessLog:
    """Writes lines without making the event loop wait. Drops lines rather than grow."""

    def __init__(self, name: str):
        """
        name  file, opened for every batch of lines, so that it may be rotated; "-": standard
              error; empty: there is no log
        """
        self._name = name
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._news = threading.Event()
        self._failed = False
        if name:
            threading.Thread(target=self._run, daemon=True).start()

    def add(self, entry: Callable[[], dict[str, Any]]) -> None:
        """Add a line. `entry` is called only if there is a log."""
        if not self._name:
            return
        if len(self._lines) >= MOST_WAITING:
            self._dropped += 1
            return
        self._lines.append(json.dumps(entry(), ensure_ascii=True) + "\n")
        self._news.set()

    def _run(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            if self._dropped:
                lines.append(json.dumps({"dropped_lines": self._dropped}) + "\n")
                self._dropped = 0
            try:
                self._write("".join(lines).encode())
                self._failed = False
            except OSError as error:
                if not self._failed:
                    log.error("--access-log %s: %s", self._name, error.strerror)
                self._failed = True

    def _write(self, data: bytes) -> None:
        if self._name == "-":
            _write_all(STDERR, data)
            return
        descriptor = os.open(self._name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
