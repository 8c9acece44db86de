"""Credentials over HTTP: what needs one, what is one, and how it is said that it is none."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest

from app.api.docs import OPEN_PATHS, STATIC_PATH
from app.config import Settings
from app.runtime import Runtime, SystemClock
from tests.integration.test_http_server import HttpServer, problem, serving
from tests.people import bearer, make_keys

Json = dict[str, Any]
SECRET = "a secret that is long enough for it"
JWT = {
    "auth_mode": "jwt",
    "jwt_secret": SECRET,
    "jwt_audience": "agentpool",
    "jwt_issuer": "https://id.example",
}
REQUEST_ID = {"X-Request-ID": "fixed"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("identity")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    return make_keys(folder)[1]


@pytest.fixture(scope="module")
def server(folder: Path, keys: dict[str, str]) -> Iterator[HttpServer]:
    path = str(folder / "keys.json")
    with HttpServer(
        auth_mode="api_key", api_keys_file=path, cors_origins=("https://app.example",)
    ) as running:
        yield running


@pytest.fixture
def client(server: HttpServer) -> httpx2.Client:
    return server.client


def token(**changes: Any) -> str:
    now = SystemClock().now_ms() // 1000
    said = {"sub": "alice", "aud": "agentpool", "iss": "https://id.example", "iat": now, "exp": now + 60}
    return jwt.encode(said | changes, SECRET)


def is_open(response: httpx2.Response) -> bool:
    return response.status_code != 401


@pytest.mark.parametrize("prefix", ["", "/api", "/agent_backend"])
def test_what_is_there_for_everybody(client: httpx2.Client, prefix: str) -> None:
    """Probes and the documentation with all that it consists of, by every prefix."""
    paths = [*OPEN_PATHS, f"{STATIC_PATH}/swagger-ui.css", f"{STATIC_PATH}/redoc.standalone.js"]
    assert {path: client.get(prefix + path).status_code for path in paths} == dict.fromkeys(paths, 200)
    assert client.get(f"{prefix}/health?probe=1", headers=bearer("nonsense")).status_code == 200


def test_a_probe_tells_no_more_than_the_contract(client: httpx2.Client) -> None:
    """Neither whose sessions there are nor where anything is."""
    told = client.get("/health").json()
    assert set(told) == {"status", "agent_initialized", "session_count", "live_agents", "version"}
    assert told["session_count"] is None
    assert client.get("/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("prefix", ["", "/api", "/agent_backend"])
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/sessions",
        "/metrics",
        "/nothing",
        "/health/",
        "//health",
        "/healthz",
        "/Health",
        "/health/x",
        "/health/..",
        "/health/../sessions",
        "/health%2f..%2fsessions",
        "/health%00",
        "/docs/../agent-stats",
        "/node/turns",
        "/node/live",
        f"{STATIC_PATH}",
        f"{STATIC_PATH}x",
    ],
)
def test_everything_else_needs_a_credential(server: HttpServer, prefix: str, path: str) -> None:
    """Routes, aliases, what is not there, and every way of writing it that might be taken for a probe."""
    for method in ("GET", "POST", "PUT"):
        assert raw(server, f"{method} {prefix}{path} HTTP/1.1")[0] == 401


@pytest.mark.parametrize(
    "path", [f"{STATIC_PATH}/../agent-stats", f"{STATIC_PATH}/%2e%2e/agent-stats", f"{STATIC_PATH}/..%2fx"]
)
def test_the_files_of_the_documentation_lead_nowhere_else(server: HttpServer, path: str) -> None:
    """A path that begins like one of them and goes back finds nothing."""
    assert raw(server, f"GET {path} HTTP/1.1")[0] == 404


def raw(server: HttpServer, *lines: str | bytes) -> tuple[int, bytes]:
    """Send a request's lines as they are; return the status and the whole answer."""
    sent = b"\r\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
        connection.sendall(sent + b"\r\nHost: h\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answer.split(b" ", 2)[1]), answer


def test_every_wrong_credential_is_answered_alike(server: HttpServer, keys: dict[str, str]) -> None:
    """Unknown, revoked in shape, of another scheme, not ASCII, huge, twice: the same 401, never a 500."""
    right = keys["alice"].encode()
    wrong = [
        [b"Authorization: Bearer " + right[:-1] + b"."],
        [b"Authorization: Bearer ap_" + b"0" * 16 + right[19:]],
        [b"Authorization: Bearer \xc3\xa9"],
        [b"Authorization: Bearer \xe9\xff"],
        [b"Authorization: Bearer"],
        [b"Authorization: " + right],
        [b"Authorization: Basic YTpi"],
        [b"Authorization: Digest username=x"],
        [b"Authorization: Bearer " + b"a" * 30_000],
        [b"Authorization: Bearer " + token().encode()],
        [b"Authorization: Bearer " + right, b"Authorization: Bearer " + right],
        [b"Authorization: Bearer " + right, b"X-API-Key: " + right],
        [b"X-API-Key: " + right, b"X-API-Key: " + keys["bobby"].encode()],
        [b"X-API-Key: "],
        [b"X-API-Key: \xe9"],
    ]
    answers = {
        raw(server, b"GET /sessions HTTP/1.1", b"X-Request-ID: fixed", *lines)[1].partition(b"date: ")[0]
        + raw(server, b"GET /sessions HTTP/1.1", b"X-Request-ID: fixed", *lines)[1].partition(b"GMT")[2]
        for lines in wrong
    }
    assert len(answers) == 1
    answer = answers.pop()
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b'www-authenticate: Bearer realm="agentpool", error="invalid_token"\r\n' in answer


def test_no_credential_is_asked_for_one(client: httpx2.Client) -> None:
    """Without an error in the challenge (RFC 6750, 3.1), and with the same document."""
    missing = client.get("/sessions", headers=REQUEST_ID)
    wrong = client.get("/sessions", headers=REQUEST_ID | bearer("x"))
    assert missing.headers["www-authenticate"] == 'Bearer realm="agentpool"'
    assert problem(missing, 401, "UNAUTHENTICATED") == problem(wrong, 401, "UNAUTHENTICATED")
    assert missing.headers["cache-control"] == "no-store"


def test_a_key_in_the_query_is_not_looked_at(client: httpx2.Client, keys: dict[str, str]) -> None:
    """Whatever it is called: it would end in every log on the way."""
    for name in ("api_key", "key", "token", "access_token", "authorization", "X-API-Key"):
        response = client.get("/sessions", params={name: keys["alice"]})
        problem(response, 401, "UNAUTHENTICATED")
        assert keys["alice"] not in response.text


def test_either_header_brings_the_key(client: httpx2.Client, keys: dict[str, str]) -> None:
    """``Authorization: Bearer`` or ``X-API-Key``, by every prefix, also on the shortcuts of chat."""
    for number, headers in enumerate((bearer(keys["alice"]), {"X-API-Key": keys["alice"]})):
        for path in ("/chat", "/api/chat", "/chat/stream"):
            body = {"session_id": f"s{number}", "message": "hi"}
            assert client.post(path, json=body, headers=headers).status_code == 200
        assert client.get(f"/sessions/s{number}", headers=headers).json()["user_id"] == "alice"


def test_nothing_of_the_body_is_read_before_it_is_known_who_asks(server: HttpServer) -> None:
    """401 at once for a body that never comes, is huge, or is not JSON."""
    for lines in (
        (b"POST /chat HTTP/1.1", b"Content-Type: application/json", b"Content-Length: 99999999999"),
        (b"POST /chat HTTP/1.1", b"Content-Type: text/plain", b"Content-Length: 5"),
        (b"POST /chat HTTP/1.1", b"Expect: 100-continue", b"Content-Length: 5"),
        (b"POST /chat HTTP/1.1", b"Transfer-Encoding: chunked"),
    ):
        status, answer = raw(server, *lines)
        assert (status, answer.count(b"HTTP/1.1")) == (401, 1)


def test_a_repeated_name_is_refused(client: httpx2.Client, keys: dict[str, str]) -> None:
    """Two users in one query: neither the first nor the last counts."""
    for query in ("user_id=alice&user_id=bobby", "user_id=bobby&user_id=alice"):
        response = client.get(f"/sessions?{query}", headers=bearer(keys["alice"]))
        problem(response, 422, "VALIDATION_ERROR")


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\nb", "x" * 129])
def test_an_admin_names_a_user_as_users_are_named(
    client: httpx2.Client, keys: dict[str, str], name: str
) -> None:
    """What could be nobody's name is 422 for an admin, and 403 for everybody else as any other name."""
    for path in ("/sessions", "/sessions/s1"):
        response = client.get(path, params={"user_id": name}, headers=bearer(keys["chief"]))
        document = problem(response, 422, "VALIDATION_ERROR")
        assert document["errors"][0]["field"] == "user_id"
        response = client.get(path, params={"user_id": name}, headers=bearer(keys["alice"]))
        problem(response, 403, "FORBIDDEN")


def test_browsers_may_ask_before_they_send_a_credential(client: httpx2.Client) -> None:
    """A preflight has none; and a page may read the 401."""
    origin = {"Origin": "https://app.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert client.options("/chat", headers=origin | asked).status_code == 200
    refused = client.post("/chat", json={"message": "hi"}, headers=origin)
    problem(refused, 401, "UNAUTHENTICATED")
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize("mode", ["api_key", "jwt"])
def test_the_schema_says_what_is_needed(mode: str, folder: Path, keys: dict[str, str]) -> None:
    """Schemes, and for every operation but the open ones: security, 401 and 403."""
    settings = JWT if mode == "jwt" else {"auth_mode": mode, "api_keys_file": str(folder / "keys.json")}
    with HttpServer(**settings) as server:
        schema = server.client.get("/openapi.json").json()
    schemes = schema["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer"
    assert set(schemes) == ({"bearer"} if mode == "jwt" else {"bearer", "api_key"})
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            is_closed = path not in OPEN_PATHS
            assert ("security" in operation) == is_closed
            assert ({"401", "403"} <= set(operation["responses"])) == is_closed


def test_tokens_over_http() -> None:
    """A token's subject is the user, its roles make an admin; a key of another mode is no token."""
    with HttpServer(**JWT) as server:
        client = server.client
        made = client.post("/sessions", json={"session_id": "s"}, headers=bearer(token()))
        assert made.json()["user_id"] == "alice"
        problem(client.get("/sessions/s", headers=bearer(token(sub="bobby"))), 404, "SESSION_NOT_FOUND")
        problem(client.get("/agent-stats", headers=bearer(token())), 403, "FORBIDDEN")
        assert client.get("/agent-stats", headers=bearer(token(roles=["admin"]))).status_code == 200
        for wrong in (token(aud="other"), token(exp=1), token()[:-3], "e30.e30.", "ap_x"):
            response = client.get("/sessions", headers=bearer(wrong))
            problem(response, 401, "UNAUTHENTICATED")
            assert 'error="invalid_token"' in response.headers["www-authenticate"]


def test_an_embedder_has_the_same_door(folder: Path, keys: dict[str, str]) -> None:
    """Mounted below a path it asks for credentials there, and nowhere else."""
    settings = Settings(
        _env_file=None,
        store_url="memory://",
        model_provider="demo",
        auth_mode="api_key",
        api_keys_file=str(folder / "keys.json"),
    )
    with HttpServer(serving(Runtime(settings), "/pool")) as server:
        client = server.client
        assert client.get("/own/").json() == "mine"
        assert client.get("/pool/health").status_code == 200
        problem(client.get("/pool/sessions"), 401, "UNAUTHENTICATED")
        assert client.get("/pool/sessions", headers=bearer(keys["alice"])).status_code == 200


def test_without_auth_names_are_filters_as_before() -> None:
    """One namespace; a session of another user is not found; nobody is asked for anything."""
    with HttpServer() as server:
        client = server.client
        client.post("/chat", json={"session_id": "s", "user_id": "alice", "message": "hi"})
        assert client.get("/sessions/s", headers=bearer("nonsense")).json()["user_id"] == "alice"
        for method, path in (("GET", "/sessions/s"), ("DELETE", "/agent-sessions/s")):
            problem(client.request(method, f"{path}?user_id=bobby"), 404, "SESSION_NOT_FOUND")
        deleted = client.post("/sessions/batch-delete?user_id=bobby", json={"session_ids": ["s"]})
        assert deleted.json() == {"deleted": 0, "missing": 1}
        assert client.delete("/agent-sessions/s?user_id=alice").status_code == 200
        deleted = client.post("/sessions/batch-delete?user_id=alice", json={"session_ids": ["s"]})
        assert deleted.json() == {"deleted": 1, "missing": 0}
        schema = json.dumps(client.get("/openapi.json").json())
        assert "securitySchemes" not in schema
        assert "UNAUTHENTICATED" not in schema
