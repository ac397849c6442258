"""The `Front` of a server: passes messages between API server processes and the scheduler."""

import json
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from mellmpi.protocol import (
    Alive,
    Answer,
    Ask,
    AttachCall,
    Cancel,
    DrainWorker,
    Emit,
    FrontEvent,
    ModelLimits,
    MoveRequest,
    OpenCall,
    OperatorAnswer,
    OperatorCommand,
    Rejected,
    ServerState,
    StartServer,
    Submit,
    UndrainWorker,
)
from mellmpi.runtime.serving.call_log import CallLog
from mellmpi.runtime.serving.process import ApiServer
from mellmpi.runtime.serving.settings import Settings

log = logging.getLogger(__name__)

STATE_EVERY_S = 1.0  # so that an API server notices that rank 0 hangs
HUNG_AFTER_S = 15.0  # without a sign of life of an API server, which gives one a second
RESTART_AFTER_S = 1.0  # between two starts of the same API server, if it dies at once

COMMANDS: dict[str, type[DrainWorker] | type[UndrainWorker] | type[MoveRequest]] = {
    "drain": DrainWorker,
    "undrain": UndrainWorker,
    "migrate": MoveRequest,
}
Submitted = Submit | Cancel | OperatorCommand
Questions = dict[str, Callable[..., str]]  # -> the answer; ValueError: why there is none


class HttpFront:
    """Submits the requests of API servers, logs and passes on their tokens, restarts servers."""

    def __init__(self, listener: socket.socket, servers: list[ApiServer], settings: Settings):
        """`servers` have been started already, before MPI."""
        self._listener, self._settings = listener, settings
        self._servers: dict[int, ApiServer] = {server.index: server for server in servers}
        self._started_s = dict.fromkeys(self._servers, 0.0)
        self._heard_s: dict[int, float] = {}  # index -> last sign of life, once there has been one
        self._restart_s: dict[int, float] = {}  # index -> when to start it again
        self._calls = CallLog()
        self._start: StartServer | None = None
        self._state = ServerState("starting", "the job is starting", ())
        self._last_id = 0  # the greatest of all requests
        self._expire_s = 0.0
        self._now = 0.0  # of the iteration
        self._is_closing = False
        self._commanded: deque[tuple[ApiServer, int]] = deque()  # (server, id of the question)
        self.questions: Questions = {}

    # --- state -----------------------------------------------------------------------------------

    def start(self, start: StartServer) -> None:
        """Tell the API servers which models there are."""
        self._start = start
        for server in self._servers.values():
            self._introduce(server)

    def set_state(self, state: str, reason: str, limits: tuple[ModelLimits, ...] = ()) -> None:
        """Tell the API servers whether requests can be served."""
        self._state = ServerState(state, reason, limits or self._state.limits)
        self._send_state()

    def _introduce(self, server: ApiServer) -> None:
        if self._start is not None:
            step = len(self._started_s)  # so that servers never use the same id
            first = (self._last_id // step + 1) * step + server.index
            server.send(StartServer(self._start.models, first, step))
        server.send(self._state)
        server.flush()

    def _send_state(self) -> None:
        for server in self._servers.values():
            server.send(self._state)
            server.flush()

    def _send_settings(self) -> None:
        for server in self._servers.values():
            server.send(self._settings.message)
            server.flush()

    @property
    def descriptors(self) -> list[int]:
        """Descriptors whose readability means that `inbox` has events."""
        return [server.fileno() for server in self._servers.values()]

    @property
    def done(self) -> bool:
        """Whether the server is shutting down and every call has been answered."""
        return self._is_closing and not self._calls.num_open

    @property
    def drains(self) -> bool:
        """Whether no new requests are taken."""
        return self._is_closing

    def drain(self) -> None:
        """Take no new requests."""
        self._is_closing = True
        self.set_state("draining", "this server is shutting down")

    # --- Front -----------------------------------------------------------------------------------

    def inbox(self, now: float) -> list[Submitted]:
        self._now = now
        events: list[Submitted] = []
        for server in list(self._servers.values()):
            try:
                messages = server.receive()
            except EOFError:
                events += self._died(server, now)
                continue
            for message in messages:
                self._take(server, message, now, events)
            server.flush()
        if now >= self._expire_s:
            self._expire_s = now + STATE_EVERY_S
            events += self._calls.expire(now)
            if self._settings.changed():
                self._send_settings()
            self._send_state()
            self._kill_hung(now)
            self._restart(now)
        return events

    def _take(self, server: ApiServer, message: Any, now: float, events: list[Submitted]) -> None:
        match message:
            case Submit():
                events.append(message)
            case Cancel(request_id, reason):
                self._calls.cancelled(request_id, now, reason)
                events.append(message)
            case OpenCall():
                self._last_id = max(self._last_id, *message.request_ids)
                self._calls.open(server.index, message)
            case AttachCall():
                for reply in self._calls.attach(server.index, message):
                    server.send(reply)
            case Ask() if message.what in COMMANDS:
                self._commanded.append((server, message.id))
                events.append(COMMANDS[message.what](**json.loads(message.arguments)))
            case Ask():
                server.send(self._answer(message))
            case Alive():
                self._heard_s[server.index] = now
            case _:
                raise TypeError(message)

    def _answer(self, ask: Ask) -> Answer:
        """An error in an answer is the asker's alone: it must not end the job."""
        if (question := self.questions.get(ask.what)) is None:
            return Answer(ask.id, f"rank 0 does not know {ask.what!r}", "")
        try:
            return Answer(ask.id, "", question(**json.loads(ask.arguments)))
        except ValueError as error:
            return Answer(ask.id, str(error), "")
        except Exception:
            log.exception("the question %s(%s) failed", ask.what, ask.arguments)
            return Answer(ask.id, f"an internal error; rank 0 has logged it under {ask.what}", "")

    def due_s(self, now: float) -> float:
        return max(0.0, self._expire_s - now)

    def deliver(self, command: FrontEvent) -> None:
        if isinstance(command, OperatorAnswer):
            asker, question = self._commanded.popleft()
            asker.send(Answer(question, command.error, ""))
            return
        servers = self._calls.servers(command.request_id)
        if isinstance(command, Emit):
            self._calls.emitted(command, self._now)
        elif isinstance(command, Rejected):
            self._calls.rejected(command, self._now)
        for index in servers:
            if (server := self._servers.get(index)) is not None:
                server.send(command)

    def flush(self) -> None:
        """Write what has been delivered."""
        for server in self._servers.values():
            server.flush()

    # --- processes -------------------------------------------------------------------------------

    def _died(self, server: ApiServer, now: float) -> list[Cancel]:
        server.close()
        del self._servers[server.index]
        self._heard_s.pop(server.index, None)
        log.warning("API server %d ended with code %s", server.index, server.process.returncode)
        self._restart_s[server.index] = self._started_s[server.index] + RESTART_AFTER_S
        cancels = self._calls.server_died(server.index, now)
        self._restart(now)
        return cancels

    def _kill_hung(self, now: float) -> None:
        """End API servers whose event loop stands still; `_died` follows."""
        for index, heard_s in list(self._heard_s.items()):
            if now - heard_s > HUNG_AFTER_S:
                log.warning("API server %d has hung for %.0f s", index, now - heard_s)
                del self._heard_s[index]
                self._servers[index].kill()

    def _restart(self, now: float) -> None:
        for index, due_s in list(self._restart_s.items()):
            if now >= due_s:
                del self._restart_s[index]
                self._started_s[index] = now
                try:
                    server = ApiServer(self._listener, index, self._settings.message)
                except OSError as error:  # no memory, process or descriptor left: for now
                    log.warning("API server %d cannot be started: %s", index, error)
                    self._restart_s[index] = now + RESTART_AFTER_S
                    continue
                self._servers[index] = server
                self._introduce(server)

    def close(self) -> None:
        """End all API servers in an orderly way."""
        for server in self._servers.values():
            server.flush()
            server.close()
        self._listener.close()
