"""Who may pass: every route with every kind of key; ids of requests; the access log; CORS."""

import json
import re
import ssl
import threading

import httpx2 as httpx
import pytest

from mellmpi.config import HttpConfig
from mellmpi.frontend.http.access import PUBLIC, ROUTES, RouteScopes
from mellmpi.frontend.http.app import make_app
from mellmpi.keys import SCOPES, line_of
from tests.api_server.serving_cell import ServingCell
from tests.api_server.test_generation import PROMPT
from tests.api_server.test_streams import until
from tests.test_keys import certificate

KEYS = {scope: f"the-key-to-{scope}" for scope in SCOPES}
BODY = {"prompt": PROMPT, "max_tokens": 5}


def lines():
    """The file of keys: one key for each scope, a second one to serve, a narrow one."""
    named = [line_of(scope, key, [scope]) for scope, key in KEYS.items()]
    named.append(line_of("other", "the-other-key", ["serve"]))
    named.append(line_of("narrow", "the-narrow-key", ["serve"], max_concurrency=1))
    return "\n".join(named) + "\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "keys").write_text(lines())
    (directory / "keys").chmod(0o600)
    return directory


@pytest.fixture(scope="module")
def guarded(byte_directory, directory):
    config = HttpConfig(
        port=0,
        api_key=["the-full-key"],
        api_key_file=str(directory / "keys"),
        access_log=str(directory / "log"),
        allowed_origins=("https://chat.example.org",),
    )
    with ServingCell(byte_directory, token_s=0.001, config=config) as cell:
        yield cell


@pytest.fixture(scope="module")
def outsider(guarded):
    with httpx.Client(base_url=guarded.url, timeout=30, trust_env=False) as client:
        yield client


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def routes():
    app = make_app(None)
    methods = [(getattr(route, "methods", None) or {"GET"}, route.path) for route in app.routes]
    return [(method, path) for found, path in methods for method in sorted(found)]


def test_every_route_has_a_scope():
    assert {path for _, path in routes()} <= ROUTES.keys()
    app = make_app(None)
    app.add_api_route("/new", lambda: None)
    with pytest.raises(ValueError, match="/new"):
        RouteScopes(app.routes)


@pytest.mark.parametrize("given", ["none", "wrong", "prefix", *SCOPES])
@pytest.mark.parametrize(("method", "path"), routes())
def test_no_route_lets_a_lesser_key_pass(outsider, method, path, given):
    headers = {
        "none": {},
        "wrong": bearer("the-wrong-key"),
        "prefix": bearer(KEYS["serve"][:-1]),
    }.get(given) or (bearer(KEYS[given]) if given in KEYS else {})
    is_mounted = path == "/static-offline-docs"  # the routes are below
    url = re.sub(r"\{.*?\}", "x", path) + ("/x" if is_mounted else "")
    with outsider.stream(method, url, headers=headers, content=b"{}") as response:
        status = response.status_code  # a stream of events has no end
        text = response.read().decode() if status in (401, 403) else ""
    needed = ROUTES[path]
    if needed in (PUBLIC, given):
        assert status not in (401, 403)
    elif given in SCOPES:
        assert status == 403 and (method == "HEAD" or f"scope {needed}" in text)
    else:
        assert status == 401 and response.headers["www-authenticate"] == "Bearer"


def test_an_unknown_path_tells_nothing_without_a_key(outsider):
    assert outsider.get("/nothing").status_code == 401
    assert outsider.get("/nothing", headers=bearer(KEYS["serve"])).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        bearer("the-full-key"),
        {"authorization": "bearer the-full-key"},
        {"x-api-key": "the-full-key"},
        {"authorization": "Basic YTpi", "x-api-key": "the-full-key"},
        {"authorization": "Bearer none", "x-api-key": "the-full-key"},
    ],
)
def test_keys_come_in_the_headers_of_openai_and_of_anthropic(outsider, headers):
    for path in ("/v1/models", "/metrics"):
        assert outsider.get(path, headers=headers).status_code not in (401, 403)


def test_a_stream_of_another_key_is_unknown(outsider):
    body = {**BODY, "stream": True}
    headers = bearer(KEYS["serve"])
    with outsider.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        path = f"/v1/streams/{response.headers['x-stream-id']}"
        response.read()
    assert outsider.get(path, headers=headers).status_code == 200
    foreign = outsider.get(path, headers=bearer("the-other-key"))
    assert foreign.status_code == 404
    missing = outsider.get("/v1/streams/cmpl-missing", headers=headers)
    assert foreign.json()["error"]["code"] == missing.json()["error"]["code"]


def test_a_stream_of_another_key_is_unknown_while_it_runs(guarded, outsider):
    guarded.hold.set()
    body = {**BODY, "stream": True}
    try:
        headers = bearer(KEYS["serve"])
        with outsider.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            path = f"/v1/streams/{response.headers['x-stream-id']}"
            assert outsider.get(path, headers=bearer("the-other-key")).status_code == 404
            guarded.hold.clear()
            assert "[DONE]" in response.read().decode()
    finally:
        guarded.hold.clear()


@pytest.mark.parametrize("name", ["..%2f..%2fkeys", "../../keys", "x" * 5000, "%00", "cmpl-%ff"])
def test_hostile_ids_of_streams_are_unknown(outsider, name):
    response = outsider.get(f"/v1/streams/{name}", headers=bearer("the-full-key"))
    assert response.status_code == 404


def test_a_key_has_no_more_requests_in_progress_than_it_may(guarded, outsider):
    guarded.hold.set()
    before = guarded.submitted
    try:
        thread = threading.Thread(
            target=outsider.post,
            args=("/v1/completions",),
            kwargs={"json": BODY, "headers": bearer("the-narrow-key")},
        )
        thread.start()
        until(lambda: guarded.submitted > before)
        refused = outsider.post("/v1/completions", json=BODY, headers=bearer("the-narrow-key"))
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert outsider.get("/v1/models", headers=bearer("the-other-key")).status_code == 200
    finally:
        guarded.hold.clear()
    thread.join()
    again = outsider.post("/v1/completions", json=BODY, headers=bearer("the-narrow-key"))
    assert again.status_code == 200


def test_changes_of_the_file_hold_at_once_and_streams_go_on(guarded, outsider, directory):
    path = directory / "keys"
    later = line_of("later", "the-later-key", ["serve"])
    path.write_text(lines() + later + "\n")
    until(lambda: outsider.get("/v1/models", headers=bearer("the-later-key")).status_code == 200)
    path.write_text(lines())
    until(lambda: outsider.get("/v1/models", headers=bearer("the-later-key")).status_code == 401)
    assert outsider.get("/v1/models", headers=bearer(KEYS["serve"])).status_code == 200


def test_a_restarted_server_asks_for_keys(guarded, outsider):
    process = guarded.server.process
    process.kill()
    until(lambda: 0 in guarded.front._servers and guarded.server.process.pid != process.pid)
    assert outsider.get("/v1/models").status_code == 401
    assert outsider.get("/v1/models", headers=bearer("the-full-key")).status_code == 200


# --- ids and the access log ----------------------------------------------------------------------


@pytest.mark.parametrize("given", ["abc-1", "x" * 128])
def test_a_readable_request_id_is_kept(outsider, given):
    assert outsider.get("/live", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", b"a\xffb", "x" * 10_000])
def test_other_request_ids_are_replaced(outsider, given):
    found = outsider.get("/live", headers={"x-request-id": given}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", found)


def test_the_access_log_has_an_object_for_each_request(outsider, directory):
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {**bearer(KEYS["serve"]), "x-request-id": "logged-1", "traceparent": parent}
    outsider.post("/v1/completions", json=BODY, headers=headers)
    outsider.get("/v1/models", headers={"x-request-id": "logged-2", "traceparent": "nonsense"})

    def found():
        entries = map(json.loads, (directory / "log").read_text().splitlines())
        return {entry["request_id"]: entry for entry in entries}

    until(lambda: {"logged-1", "logged-2"} <= found().keys())
    served, refused = found()["logged-1"], found()["logged-2"]
    assert served["key"] == "serve" and served["route"] == "/v1/completions"
    assert (served["status"], served["method"]) == (200, "POST")
    assert (served["prompt_tokens"], served["completion_tokens"]) == (10, 5)
    assert 0 <= served["ttft_s"] <= served["duration_s"] < 30
    assert served["client"] == "127.0.0.1" and served["traceparent"] == parent
    assert (refused["status"], refused["key"], refused["traceparent"]) == (401, None, None)
    assert not any(key in (directory / "log").read_text() for key in KEYS.values())


# --- CORS, TLS, no keys --------------------------------------------------------------------------


def test_pages_of_allowed_origins_may_call(outsider):
    asked = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization"
    allowed = outsider.options("/v1/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == asked["origin"]
    refused = outsider.options(
        "/v1/completions", headers={**asked, "origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in refused.headers
    error = outsider.get("/v1/models", headers={"origin": asked["origin"]})
    assert error.status_code == 401 and "access-control-allow-origin" in error.headers


@pytest.mark.parametrize("origin", ["https://chat.example.org", "http://127.0.0.1:1", "null"])
def test_without_keys_scripts_of_other_sites_may_not_call(http, origin):
    response = http.post("/v1/completions", json=BODY, headers={"origin": origin})
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    assert "--allowed-origins" in response.json()["error"]["message"]
    assert http.get("/live", headers={"origin": origin}).status_code == 200


def test_without_keys_programs_here_and_the_own_page_may_call(cell, http):
    assert http.get("/v1/models", headers=bearer("whatever")).status_code == 200
    assert http.get("/v1/models", headers={"origin": cell.url}).status_code == 200


def test_https_with_a_certificate_that_changes(byte_directory, tmp_path):
    cert, key = certificate(tmp_path, "one")
    config = HttpConfig(port=0, ssl_certfile=cert, ssl_keyfile=key)
    with ServingCell(byte_directory, config=config) as cell:
        assert cell.url.startswith("https://")
        port = int(cell.url.rpartition(":")[2])
        with httpx.Client(base_url=cell.url, verify=False, trust_env=False, timeout=30) as client:
            answer = client.post("/v1/completions", json=BODY).json()
            assert answer["usage"]["completion_tokens"] == 5
            first = ssl.get_server_certificate(("127.0.0.1", port))
            for old, new in zip((cert, key), certificate(tmp_path, "two"), strict=True):
                with open(old, "w") as target, open(new) as source:
                    target.write(source.read())
            until(lambda: ssl.get_server_certificate(("127.0.0.1", port)) != first)
            assert client.get("/live").status_code == 200
