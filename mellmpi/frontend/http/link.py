"""The API server's end of the pipe to rank 0."""

import asyncio
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from mellmpi.frontend.dialects import dialect_of
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.http.bounded import Threads
from mellmpi.frontend.http.calls import LiveCall, Pacer
from mellmpi.frontend.openai import Call
from mellmpi.frontend.served import ServedModel, ServedModels
from mellmpi.frontend.strict_json import json_object
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.protocol import (
    Alive,
    Answer,
    Ask,
    AttachCall,
    CallUnknown,
    Decoder,
    Emit,
    OpenCall,
    Rejected,
    ServerSettings,
    ServerState,
    StartServer,
    Submit,
    encode,
)

log = logging.getLogger(__name__)
T = TypeVar("T")
STARTING = ServerState("starting", "rank 0 is starting", ())
ALIVE_EVERY_S = 1.0
SILENT_S = 10.0  # without a message of rank 0: it hangs


class Link(asyncio.Protocol):
    """Opens calls, and passes messages of rank 0 to them."""

    def __init__(self, on_lost: Callable[[], None]):
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._decoder, self._pacer = Decoder(), Pacer(self._loop)
        self._calls: dict[int, LiveCall] = {}  # by request id
        self.takers: dict[int, Callable[[Emit | Rejected], None]] = {}  # requests without a call
        self._named: dict[str, LiveCall] = {}  # by call id
        self._attaching: dict[str, list[asyncio.Future[LiveCall | None]]] = {}
        self._waiting: dict[int, list[Emit | Rejected]] = {}  # for calls that are being made
        self._tasks: set[asyncio.Task[None]] = set()
        self._questions: dict[int, asyncio.Future[Answer]] = {}
        self._question_ids = itertools.count(1)
        self._request_ids = itertools.count(1)
        self._tokenizers: dict[str, Tokenizer] = {}
        self._started = asyncio.Event()  # tokenizers and limits are known
        self._heard_s = self._loop.time()
        self.state = STARTING
        self.names: tuple[str, ...] = ()
        self.served: ServedModels | None = None
        self.settings: ServerSettings | None = None
        self.on_settings: Callable[[ServerSettings], None] = lambda _: None
        self._threads = Threads()
        self._configured = asyncio.Event()

    # --- the pipe --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def _tell_alive(self) -> None:
        if not self._transport.is_closing():
            self.send(Alive())
            self._loop.call_later(ALIVE_EVERY_S, self._tell_alive)

    def connection_lost(self, error: Exception | None) -> None:
        self._configured.set()
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._loop.time()
        for message in self._decoder.feed(data):
            self._handle(message)

    def send(self, message: Any) -> None:
        """Send a message to rank 0. Does nothing once the pipe has ended."""
        if self._transport.is_closing():
            return
        self._transport.write(encode(message))

    def new_id(self) -> int:
        """Return the id of a new request."""
        return next(self._request_ids)

    def _handle(self, message: Any) -> None:
        match message:
            case Emit(request_id) | Rejected(request_id) if request_id in self._waiting:
                self._waiting[request_id].append(message)
            case Emit(request_id) | Rejected(request_id) if request_id in self.takers:
                self.takers[request_id](message)
            case Emit(request_id) if request_id in self._calls:
                self._take(self._calls[request_id], message)
            case Rejected(request_id) if request_id in self._calls:
                call = self._calls[request_id]
                call.reject(message)
                self._changed(call)
            case ServerState():
                self._set_state(message)
            case ServerSettings():
                self.settings = message
                self._configured.set()
                self.on_settings(message)
            case StartServer():
                self._start(message)
            case OpenCall():
                self._attached(message)
            case CallUnknown(call_id):
                self._resolve(call_id, None)
            case Answer(question):
                if (future := self._questions.pop(question, None)) and not future.done():
                    future.set_result(message)

    def _take(self, call: LiveCall, emit: Emit) -> None:
        try:
            call.take(emit)
        except Exception:
            log.exception("call %s failed", call.opened.call_id)
        self._changed(call)

    def _changed(self, call: LiveCall) -> None:
        self._pacer.changed(call)
        if call.done:
            self.forget(call)

    def forget(self, call: LiveCall) -> None:
        """Drop a call. Its responses keep what they need; rank 0 still has its tokens."""
        self._named.pop(call.opened.call_id, None)
        for request_id in call.opened.request_ids:
            self._calls.pop(request_id, None)

    # --- state -----------------------------------------------------------------------------------

    def _start(self, start: StartServer) -> None:
        self._request_ids = itertools.count(start.first_id, start.id_step)
        self.names = tuple(model.name for model in start.models)
        for model in start.models:
            template = Path(model.chat_template) if model.chat_template else None
            self._tokenizers[model.name] = Tokenizer.load(Path(model.directory), template)
        self._tell_alive()  # not before: reading a tokenizer may take long

    def _set_state(self, state: ServerState) -> None:
        self.state = state
        if state.limits and self.served is None:
            models = [
                ServedModel(
                    name=limit.name,
                    max_model_len=limit.max_model_len,
                    vocab_size=limit.vocab_size,
                    eos_ids=limit.eos_ids,
                )
                for limit in state.limits
            ]
            self.served = ServedModels.of(*((m, self._tokenizers[m.name]) for m in models))
            self._started.set()

    @property
    def silent_s(self) -> float:
        """Seconds since the last message of rank 0, which sends one a second at least; 0 while it
        joins the other ranks and converts weights, which may take minutes."""
        if self.state is STARTING:
            return 0.0
        return self._loop.time() - self._heard_s

    @property
    def problem(self) -> str:
        """Why this server cannot take requests now; empty if it can."""
        if self.silent_s > SILENT_S:
            return f"rank 0 has been silent for {self.silent_s:.0f} s"
        return "" if self.state.state == "ready" else self.state.reason

    async def wait_settings(self) -> ServerSettings | None:
        """Wait for the first message of rank 0. None: the pipe has ended."""
        await self._configured.wait()
        return self.settings

    async def wait_started(self) -> ServedModels:
        """Wait until the workers have started; return the models."""
        await self._started.wait()
        assert self.served is not None
        return self.served

    # --- calls -----------------------------------------------------------------------------------

    async def open(self, url: str, body: bytes, call_id: str, owner: str, now: float) -> LiveCall:
        """Check a body, and submit its requests. Raises BadRequest.

        now  unix time, seconds
        """
        served = await self.wait_started()
        call = await self.bounded(self._parsed, served, url, body, call_id)
        requests = call.requests(self._request_ids)
        ids = tuple(request.id for request in requests)
        opened = OpenCall(call_id, owner, url, body, int(now), call.stream, ids)
        live = self._add(opened, call)
        self.send(opened)
        for request in requests:
            self.send(Submit(request))
        return live

    async def bounded(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return the result of a function that renders or tokenizes a body, run in a thread.

        Raises BadRequest if it takes too long. A template may loop for ever, and megabytes take
        seconds to tokenize: other calls must not wait.
        """
        assert self.settings is not None
        limit_s = self.settings.limits.parse_within_s
        try:
            return await self._threads.run(limit_s, function, *arguments)
        except TimeoutError as error:
            raise BadRequest(
                f"rendering and tokenizing take longer than {limit_s:g} s", code="too_slow"
            ) from error

    def _parsed(self, served: ServedModels, url: str, body: bytes, call_id: str) -> Call:
        return dialect_of(url).parse(url, json_object(body), served, call_id)

    def _add(self, opened: OpenCall, call: Call) -> LiveCall:
        live = LiveCall(opened, call, self._tokenizers[call.model], self.send)
        self._named[opened.call_id] = live
        for request_id in opened.request_ids:
            self._calls[request_id] = live
        return live

    async def attach(self, call_id: str, owner: str) -> LiveCall | None:
        """Return a call that another connection, or an earlier API server, has opened.

        None: there is none of this owner, or it has ended too long ago.
        """
        await self.wait_started()
        if (live := self._named.get(call_id)) is not None:
            return live if live.opened.owner == owner else None
        future: asyncio.Future[LiveCall | None] = self._loop.create_future()
        waiting = self._attaching.setdefault(call_id, [])
        waiting.append(future)
        if len(waiting) == 1:
            self.send(AttachCall(call_id, owner))
        live = await future
        return live if live is None or live.opened.owner == owner else None

    def _attached(self, opened: OpenCall) -> None:
        waiting: list[Emit | Rejected] = []
        for request_id in opened.request_ids:
            self._waiting[request_id] = waiting
        task = self._loop.create_task(self._make_again(opened, waiting))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make_again(self, opened: OpenCall, waiting: list[Emit | Rejected]) -> None:
        """Make a call of rank 0's log; its tokens wait meanwhile."""
        assert self.served is not None
        live = None
        try:
            call = await self.bounded(
                self._parsed, self.served, opened.url, opened.body, opened.call_id
            )
            live = self._add(opened, call)
        except Exception:  # it was made once: this process is slower, or the template has changed
            log.exception("call %s cannot be continued", opened.call_id)
        for request_id in opened.request_ids:
            del self._waiting[request_id]
        for message in waiting:
            self._handle(message)
        self._resolve(opened.call_id, live)

    def _resolve(self, call_id: str, live: LiveCall | None) -> None:
        for future in self._attaching.pop(call_id, ()):
            if not future.done():
                future.set_result(live)

    # --- questions -------------------------------------------------------------------------------

    async def ask(self, what: str, limit_s: float = 5.0, **arguments: Any) -> str:
        """Ask rank 0. Raises BadRequest with its error, or if it does not answer in time."""
        question = Ask(next(self._question_ids), what, json.dumps(arguments))
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._questions[question.id] = future
        self.send(question)
        try:
            answer = await asyncio.wait_for(future, limit_s)
        except TimeoutError:
            self._questions.pop(question.id, None)
            raise BadRequest("rank 0 does not answer", code="stalled", status=503) from None
        if answer.error:
            raise BadRequest(answer.error, code=f"{what}_refused")
        return answer.body
