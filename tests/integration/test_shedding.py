"""What a refusal because of an overload is like over HTTP, on our server's connections and on stock ones."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from app.api.protocol import PushingProtocol, limit_send_buffer
from app.api.shedding import burden_of
from app.config import Settings
from app.main import create_app
from app.services.overload import RETRY_S, START, Burden
from tests.integration.test_http_server import HttpServer, problem
from tests.modelserver import ModelServer

BODY = {"session_id": "s", "message": "hi"}
ORIGIN = "https://page.example"
KEY = {True: {"Idempotency-Key": "k"}, False: {}}
TURNS = ("/chat", "/chat/stream", "/sessions/s/regenerate", "/sessions/s/compact")
PROTOCOLS = {"ours": PushingProtocol, "httptools": "httptools", "h11": "h11"}


@pytest.fixture(scope="module", params=PROTOCOLS)
def server(request: pytest.FixtureRequest) -> Iterator[HttpServer]:
    """A server with one session, which was answered before there was too much to do."""
    settings = Settings(
        store_url="memory://", model_provider="demo", cors_origins=(ORIGIN,), overload_lag_ms=60_000
    )
    running = HttpServer(create_app(settings))
    running._server.config.http = PROTOCOLS[request.param]
    running._server.config.proxy_headers = False  # as our own server has it: nothing stands before the app
    with running:
        assert running.client.post("/chat", json=BODY).status_code == 200
        yield running


@pytest.fixture
def choked(server: HttpServer) -> Iterator[HttpServer]:
    """The server while its gate lets no turn in."""
    server.app.state.gate.limit = 0  # type: ignore[attr-defined]
    try:
        yield server
    finally:
        server.app.state.gate.limit = START  # type: ignore[attr-defined]


def test_turns_are_refused(choked: HttpServer) -> None:
    """Each kind of turn, under every prefix, with what a client and its user need to know."""
    for path in (*TURNS, "/api/chat", "/agent_backend/chat/stream"):
        headers = {"Origin": ORIGIN, "X-Request-ID": "mine"}
        refused = choked.client.post(path, json=BODY if "chat" in path else {}, headers=headers)
        document = problem(refused, 503, "OVERLOADED")
        assert document["instance"] == path
        assert document["request_id"] == "mine"
        assert 1 <= document["retry_after_s"] <= RETRY_S
        assert refused.headers["access-control-allow-origin"] == ORIGIN


def test_all_else_goes_on(choked: HttpServer) -> None:
    """Probes, admin routes, cancels and reads are answered, and so is who asks what is allowed."""
    client = choked.client
    before = client.get("/agent-stats").json()["rejections"].get("OVERLOADED", 0)
    client.post("/chat", json=BODY)
    for path in ("/health", "/ready", "/api/health", "/agent-sessions", "/sessions", "/sessions/s/history"):
        assert client.get(path).status_code == 200
    problem(client.post("/sessions/s/cancel", json={}), 409, "NO_ACTIVE_TURN")
    assert client.post("/agent-cleanup", json={}).status_code == 200
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert client.options("/chat", headers=asked).status_code == 200
    assert client.get("/agent-stats").json()["rejections"]["OVERLOADED"] == before + 1
    assert client.get("/sessions/s").json()["turn_count"] == 1


def test_a_refusal_says_nothing_of_who_may(choked: HttpServer) -> None:
    """It comes before the body is looked at: wrong ones and those of nobody's sessions get the same."""
    for content in (b"", b"{", b"\xff" * 300_000):
        problem(choked.client.post("/chat", content=content), 503, "OVERLOADED")


def test_a_choked_loop_refuses_the_rest_too(choked: HttpServer) -> None:
    """Reads as well, but never what looks after the process."""
    gate = choked.app.state.gate  # type: ignore[attr-defined]
    gate._is_choked = True
    try:
        problem(choked.client.get("/sessions"), 503, "OVERLOADED")
        assert choked.client.get("/health").status_code == 200
        assert choked.client.get("/agent-stats").status_code == 200
    finally:
        gate._is_choked = False


@pytest.mark.parametrize(
    ("method", "path", "burden"),
    [
        ("GET", "/health", Burden.NONE),
        ("GET", "/api/metrics", Burden.NONE),
        ("POST", "/agent-cleanup", Burden.NONE),
        ("POST", "/node/cancel", Burden.NONE),
        ("POST", "/sessions/s/cancel", Burden.NONE),
        ("POST", "/sessions/s/compact", Burden.TURN),
        ("GET", "/sessions/stats", Burden.OTHER),
        ("DELETE", "/agents/a/sessions", Burden.OTHER),
        ("PATCH", "/apps/a/state", Burden.OTHER),
        ("DELETE", "/users/alice", Burden.OTHER),
    ],
)
def test_what_is_never_refused(method: str, path: str, burden: Burden) -> None:
    """Probes, the pool's routes, nodes and cancels; a choked loop refuses all else, admins' routes, too."""
    root = "/api" if path.startswith("/api/") else ""
    assert burden_of({"method": method, "path": path, "root_path": root}) is burden


def request(path: str = "/chat", body: Any = BODY, more: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def answers(server: HttpServer, *parts: bytes, count: int, is_late: bool = False) -> list[httpx2.Response]:
    """Send ``parts`` on one connection and return so many answers, ``is_late`` when there is no more room."""
    found = []
    with socket.socket() as connection:
        connection.settimeout(10)
        if is_late:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        for part in parts:
            connection.sendall(part)
        for _ in range(3 if is_late else 0):
            server.client.get("/health")  # what came before has been read
        reader = connection.makefile("rb")
        while len(found) < count:
            status = int(reader.readline().split()[1])
            headers = {}
            while line := reader.readline().strip():
                name, _, value = line.partition(b":")
                headers[name.decode().lower()] = value.strip().decode()
            body = reader.read(int(headers["content-length"]))
            found.append(httpx2.Response(status, headers=headers, content=body))
    return found


def test_the_connection_goes_on(choked: HttpServer) -> None:
    """After a refusal, whose body is still on its way, the next request is answered on it."""
    whole = request()
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    found = answers(choked, whole[:-5], whole[-5:], whole, health, count=3)
    assert [answer.status_code for answer in found] == [503, 503, 200]


def test_a_pipeline_is_answered_in_order(choked: HttpServer) -> None:
    """Hundreds of refusals and other answers in one write, each in its place."""
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    found = answers(choked, (request() + health + request("/chat/stream")) * 200, count=600)
    assert [answer.status_code for answer in found] == [503, 200, 503] * 200


@pytest.mark.parametrize("padding", range(1, 120, 10))
def test_who_does_not_read_is_refused_in_the_end(choked: HttpServer, padding: int) -> None:
    """Wherever in a refusal the client's room ends, what is left of it comes when there is room again."""
    [listener] = choked._server.servers[0].sockets
    limit_send_buffer(listener)
    refused = request(more=f"X-Request-ID: {padding * 'a'}\r\n")
    found = answers(choked, refused * 600, count=600, is_late=True)
    assert [answer.status_code for answer in found] == [503] * 600


@pytest.mark.parametrize("more", ["Connection: close\r\n", "Expect: 100-continue\r\n"])
def test_a_refusal_of_one_that_leaves_or_waits(choked: HttpServer, more: str) -> None:
    """Who wants the connection closed, and who waits before it sends its body, gets the refusal, too."""
    head = request(more=more).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    [refused] = answers(choked, head, count=1)
    problem(refused, 503, "OVERLOADED")


def test_what_has_not_come_takes_no_place(server: HttpServer) -> None:
    """Turns whose bodies stay away are none yet, however many; the gate is asked again when they come."""
    gate = server.app.state.gate  # type: ignore[attr-defined]
    waiting = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(50)]
    try:
        for connection in waiting:
            connection.sendall(request()[:-5])
        for _ in range(3):
            assert server.client.get("/health").status_code == 200
        assert gate.in_flight == 0
        gate.limit = 0
        waiting[0].sendall(request()[-5:])
        assert waiting[0].recv(12) == b"HTTP/1.1 503"
    finally:
        gate.limit = START
        for connection in waiting:
            connection.close()


def test_normal_again(server: HttpServer) -> None:
    """When the gate is open, nothing is left of it."""
    assert server.client.post("/chat", json={**BODY, "session_id": "later"}).status_code == 200
    assert server.app.state.gate.in_flight == 0  # type: ignore[attr-defined]


def test_a_turn_has_one_place_however_many_watch_it() -> None:
    """Repeats with its key, and watchers, take none; when it has been answered its place is free."""
    settings = {"model_provider": "openai", "openai_api_key": "k", "overload_lag_ms": 60_000}
    with ModelServer() as model, HttpServer(openai_base_url=model.base_url, **settings) as server:
        gate = server.app.state.gate  # type: ignore[attr-defined]
        model.script({"mode": "text", "text": "well", "first_s": 30, "repeat": 2})
        with ExitStack() as streams:

            def begin(body: Any, places: int) -> httpx2.Response:
                stream = server.client.stream("POST", "/chat/stream", json=body, headers=KEY[body is BODY])
                answer = streams.enter_context(stream)
                assert (answer.status_code, gate.in_flight) == (200, places)
                return answer

            watched = [begin(BODY, 1) for _ in range(5)]
            other = begin({"message": "hi"}, 2)
            for answer in (watched[0], other):
                session = answer.headers["x-session-id"]
                server.client.post(f"/sessions/{session}/cancel", json={"keep_partial": False})
            for answer in (*watched, other):
                assert "turn.cancelled" in answer.read().decode()
        model.reset()
        for _ in range(2):
            assert server.client.post("/chat", json=BODY, headers=KEY[True]).status_code == 200
        assert server.client.get("/health").status_code == 200
        assert gate.in_flight == 0
