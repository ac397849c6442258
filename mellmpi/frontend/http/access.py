"""Who may use which route: the scope of every route, and the keys."""

import hmac
from collections.abc import Iterable

from starlette.requests import Request
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from mellmpi.keys import METRICS, OPERATE, SERVE, digest
from mellmpi.protocol import ApiKey

PUBLIC = "public"  # for everybody, without a key
ROUTES = {  # path -> scope that a key needs for it. A route that is not here ends the start.
    "/live": PUBLIC,
    "/ready": PUBLIC,
    "/health": PUBLIC,
    "/version": PUBLIC,
    "/openapi.json": PUBLIC,  # the API's documents are the same for every server
    "/docs": PUBLIC,
    "/docs/oauth2-redirect": PUBLIC,
    "/static-offline-docs": PUBLIC,
    "/": PUBLIC,  # the page holds no data: its scripts ask for it, with the key of who looks
    "/v1/models": SERVE,
    "/v1/models/{name:path}": SERVE,
    "/v1/chat/completions": SERVE,
    "/v1/completions": SERVE,
    "/v1/responses": SERVE,
    "/v1/responses/{response_id}": SERVE,
    "/v1/messages": SERVE,
    "/v1/messages/count_tokens": SERVE,
    "/v1/streams/{call_id}": SERVE,
    "/v1/files": SERVE,
    "/v1/files/{file_id}": SERVE,
    "/v1/files/{file_id}/content": SERVE,
    "/v1/batches": SERVE,
    "/v1/batches/{batch_id}": SERVE,
    "/v1/batches/{batch_id}/cancel": SERVE,
    "/tokenize": SERVE,
    "/detokenize": SERVE,
    "/tokenizer_info": SERVE,
    "/load": METRICS,
    "/metrics": METRICS,
    "/v1/cluster": METRICS,
    "/v1/cluster/events": METRICS,
    "/v1/cluster/workers/{worker}/drain": OPERATE,
    "/v1/cluster/workers/{worker}/undrain": OPERATE,
    "/v1/cluster/requests/{request_id}/migrate": OPERATE,
    "/v1/cluster/loglevel": OPERATE,
}


class RouteScopes:
    """Finds the route of a request, and its scope."""

    def __init__(self, routes: Iterable[BaseRoute]):
        """Raises ValueError if the scope of a route is not declared."""
        self._routes = list(routes)
        paths = {_path(route) for route in self._routes}
        if missing := paths - ROUTES.keys():
            raise ValueError(f"routes without a scope in access.py: {', '.join(sorted(missing))}")

    def find(self, scope: Scope) -> tuple[str, str | None]:
        """Return path and scope of the route of a request; for unknown paths "" and None."""
        for route in self._routes:
            if route.matches(scope)[0] != Match.NONE:
                return _path(route), ROUTES[_path(route)]
        return "", None


def methods_of(request: Request) -> str:
    """Return the methods of the path of a request, for `Allow` (RFC 9110, section 15.5.6)."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] != Match.NONE:
            found |= set(getattr(route, "methods", None) or ())
    return ", ".join(sorted(found))


def _path(route: BaseRoute) -> str:
    return str(getattr(route, "path", route))


class Keyring:
    """The keys of a server, found by their hashes."""

    def __init__(self, keys: tuple[ApiKey, ...]):
        self._keys = keys

    @property
    def is_empty(self) -> bool:
        """Whether no key is needed."""
        return not self._keys

    def find(self, scope: Scope) -> ApiKey | None:
        """Return the key that a request carries, or None."""
        found = None
        for given in _credentials(scope["headers"]):
            hashed = digest(given)
            for key in self._keys:  # all of them: the time tells nothing
                if hmac.compare_digest(key.sha256, hashed):
                    found = found or key
        return found


def _credentials(headers: list[tuple[bytes, bytes]]) -> list[str]:
    """Keys in the forms of OpenAI (RFC 6750, bearer token) and of Anthropic."""
    found = []
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            found.append(value[7:].strip().decode("latin-1"))
        elif name == b"x-api-key":
            found.append(value.strip().decode("latin-1"))
    return found[:2]
