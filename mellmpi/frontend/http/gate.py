"""The gate before all routes: keys, ids of requests, the access log."""

import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.http.access import PUBLIC, Keyring, RouteScopes
from mellmpi.frontend.http.access_log import AccessLog
from mellmpi.frontend.http.calls import LiveCall
from mellmpi.protocol import ApiKey, ServerSettings

REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # printable
TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
EXPOSED = ("X-Request-Id", "X-Stream-Id", "Retry-After")  # headers that scripts of pages may read

Refuse = Callable[[Request, BadRequest], Awaitable[Response]]


class Visit:
    """One HTTP request on its way through the server. Routes find it in `request.state.visit`."""

    def __init__(self, scope: Scope):
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self.id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        parent = headers.get(b"traceparent", b"")  # W3C Trace Context
        self.traceparent = parent.decode() if TRACEPARENT.fullmatch(parent) else None
        self.client = (scope.get("client") or ("",))[0]
        self.method = scope["method"]
        self.route = ""  # its path; empty: there is none
        self.owner = ""  # name of the key; empty: none was needed
        self.call: LiveCall | None = None
        self.status = 0  # of HTTP; 0: the client left before
        self.time, self.began_s = time.time(), time.monotonic()

    def entry(self) -> dict[str, Any]:
        """Return the line of the access log."""
        call, now_s = self.call, time.monotonic()
        first_s = call.first_s if call else None
        return {
            "time": round(self.time, 3),
            "request_id": self.id.decode(),
            "key": self.owner or None,
            "method": self.method,
            "route": self.route or None,
            "status": self.status,
            "duration_s": round(now_s - self.began_s, 6),
            "ttft_s": None if first_s is None else round(max(0.0, first_s - self.began_s), 6),
            "prompt_tokens": sum(map(len, call.call.prompts)) if call else None,
            "completion_tokens": sum(len(o.tokens) for o in call.outputs) if call else None,
            "client": self.client,
            "traceparent": self.traceparent,
        }


class Gate:
    """Lets requests pass that have a key with the scope of their route. An ASGI application."""

    def __init__(self, app: Starlette, refuse: Refuse, log: AccessLog):
        self._app, self._refuse, self._log = app, refuse, log
        self._scopes = RouteScopes(app.routes)
        self._keys, self._origins = Keyring(()), frozenset[str]()
        self._running: Counter[str] = Counter()  # requests in progress by key

    def configure(self, settings: ServerSettings) -> None:
        """Use these keys from now on."""
        self._keys = Keyring(settings.keys)
        self._origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = Visit(scope)
        scope.setdefault("state", {})["visit"] = visit

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", visit.id)]
                message = {**message, "headers": headers}
            await send(message)

        try:
            key = self._admit(scope, visit)
        except BadRequest as error:
            response = await self._refuse(Request(scope), error)
            await response(scope, receive, send_with_id)
            self._log.add(visit.entry)
            return
        self._running[visit.owner] += 1 if key else 0
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        finally:
            self._running[visit.owner] -= 1 if key else 0
            self._log.add(visit.entry)

    def _admit(self, scope: Scope, visit: Visit) -> ApiKey | None:
        """Return the key of a request, None if it needs none. Raises BadRequest."""
        visit.route, needed = self._scopes.find(scope)
        if needed == PUBLIC:
            return None
        if self._keys.is_empty:
            self._check_origin(scope)
            return None
        if (key := self._keys.find(scope)) is None:
            raise BadRequest(
                "this server needs a key: send it as  Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
                headers=(("www-authenticate", "Bearer"),),
            )
        visit.owner = key.name
        if needed is not None and needed not in key.scopes:
            raise BadRequest(
                f"the key {key.name} does not have the scope {needed}",
                code="missing_scope",
                status=403,
            )
        if 0 < key.max_concurrency <= self._running[key.name]:
            raise BadRequest(
                f"the key {key.name} may have {key.max_concurrency} requests in progress",
                code="too_many_requests",
                status=429,
                headers=(("retry-after", "1"),),
            )
        return key

    def _check_origin(self, scope: Scope) -> None:
        """Raise BadRequest for a script of another site: without keys it could use a browser's
        reach to operate a server that only this machine can reach."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        own = headers.get(b"host", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != own and not {"*", origin} & self._origins:
            raise BadRequest(
                f"web pages of {origin[:100]} may not use this server; --allowed-origins lets them",
                code="origin_not_allowed",
                status=403,
            )


def with_cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """Let scripts of pages from these origins call the application."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
    )
