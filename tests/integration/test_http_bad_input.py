"""Bad input over a real connection: a 4xx with a problem document, never a 5xx, never silence."""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.integration.test_http_server import HttpServer, problem

JSON = {"Content-Type": "application/json"}
TURN = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"
DEEP: dict = {}
for _ in range(32):
    DEEP = {"a": DEEP}


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with HttpServer() as running:
        running.client.post("/sessions", json={"session_id": "s"})
        yield running


@pytest.fixture
def client(server: HttpServer) -> httpx2.Client:
    return server.client


def message(text: str) -> bytes:
    return json.dumps({"message": text}).encode()


@pytest.mark.parametrize("path", ["/chat", "/chat/stream", "/api/chat"])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "VALIDATION_ERROR"),
        (b"null", 422, "VALIDATION_ERROR"),
        (b"[]", 422, "VALIDATION_ERROR"),
        (b'"x"', 422, "VALIDATION_ERROR"),
        (b"{}", 422, "VALIDATION_ERROR"),
        (message(""), 422, "VALIDATION_ERROR"),
        (message("  \u200b\n"), 422, "VALIDATION_ERROR"),
        (message("x" * 100_001), 422, "VALIDATION_ERROR"),
        (message("\ud800"), 422, "VALIDATION_ERROR"),
        (message("a\0b"), 422, "VALIDATION_ERROR"),
        (b'{"message":7}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","\\ud800":1}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","metadata":{"a":"\\udc00"}}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","metadata":{"n":9223372036854775808}}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","unknown":1}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","session_id":"a/b"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","session_id":"batch-delete"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","user_id":"a\\u0007"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","api_key":"k"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","on_busy":"merge"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","on_disconnect":"stop"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","parent":"head"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","parent":"0199C1F2-7D1A-7B3E-8C55-3F0E9D2B6A11"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","parent":["root"]}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","params":{"temperature":3}}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","model":"nothing"}', 422, "UNKNOWN_MODEL"),
        (b'{"message":"x","provider":"nobody"}', 422, "UNKNOWN_MODEL"),
        (b'{"message":"x","agent_id":"nobody"}', 404, "AGENT_NOT_FOUND"),
        (b'{"message":"x","metadata":{"n":NaN}}', 400, "MALFORMED_JSON"),
        (b'{"message":NaN}', 400, "MALFORMED_JSON"),
        (b'{"message":"x","metadata":{"n":1e400}}', 400, "MALFORMED_JSON"),
        (b'{"message":"x","message":"y"}', 400, "MALFORMED_JSON"),
        (b'{"message":"x"', 400, "MALFORMED_JSON"),
        (b'{"message":"\xed\xa0\x80"}', 400, "MALFORMED_JSON"),
        (b'\xef\xbb\xbf{"message":"x"}', 400, "MALFORMED_JSON"),
        (b'{"message":"x","metadata":' + b'{"a":' * 900 + b"1" + b"}" * 901, 400, "MALFORMED_JSON"),
        (b'{"message":"x","metadata":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 400, "MALFORMED_JSON"),
    ],
)
def test_chat_bodies(client: httpx2.Client, path: str, body: bytes, status: int, code: str) -> None:
    """The right refusal, the same for both ways to chat, without the input in it."""
    document = problem(client.post(path, content=body, headers=JSON), status, code)
    if code == "VALIDATION_ERROR":
        assert document["errors"]
        assert all(set(error) == {"field", "message"} for error in document["errors"])
    assert "x" * 100 not in json.dumps(document)


def test_the_longest_message_passes(client: httpx2.Client) -> None:
    """100,000 characters, three bytes each, are within every limit."""
    assert client.post("/chat", json={"message": "长" * 100_000}).status_code == 200


def test_a_wrong_value_is_never_shown(client: httpx2.Client) -> None:
    """Neither a secret in the wrong place nor a wrong type comes back."""
    body = {"message": {"api_key": "sk-12345"}, "session_id": "sk-12345!", "metadata": "sk-12345"}
    assert "sk-12345" not in client.post("/chat", json=body).text


def test_an_unknown_fields_name_is_cut(client: httpx2.Client) -> None:
    """A key of any length and content makes a short, printable name."""
    document = problem(client.post("/chat", json={"message": "x", "k\n" * 5000: 1}), 422, "VALIDATION_ERROR")
    assert len(document["errors"][0]["field"]) < 80
    assert "\n" not in document["errors"][0]["field"]


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/xml",
     "application/json; charset=utf-16"],
)  # fmt: skip
def test_other_content_types(client: httpx2.Client, content_type: str | None) -> None:
    """Only JSON in UTF-8; this also keeps other sites' forms out."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    problem(client.post("/chat", content=b'{"message":"x"}', headers=headers), 415, "UNSUPPORTED_MEDIA_TYPE")


def test_a_compressed_body(client: httpx2.Client) -> None:
    """No bomb is unpacked."""
    headers = {**JSON, "Content-Encoding": "gzip"}
    problem(client.post("/chat", content=b"\x1f\x8b", headers=headers), 415, "UNSUPPORTED_MEDIA_TYPE")


def test_a_large_body_with_its_length(client: httpx2.Client) -> None:
    """2 MB, announced."""
    problem(client.post("/chat", content=b"x" * 2_000_000, headers=JSON), 413, "PAYLOAD_TOO_LARGE")


def exchange(server: HttpServer, *parts: bytes) -> bytes:
    """Send the parts, as far as the server lets them in, and return all that comes back."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
    return received


def test_a_large_body_without_its_length(server: HttpServer) -> None:
    """2 MB in chunks: cut at the limit, and the client still gets to read why."""
    head = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    received = exchange(server, head, *[chunk] * 2000, b"0\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 413 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["code"] == "PAYLOAD_TOO_LARGE"


@pytest.mark.parametrize("extra", ["", "Expect: 100-continue\r\n"])
def test_an_announced_monster_is_refused_at_once(server: HttpServer, extra: str) -> None:
    """Nothing of the body has to be sent, and none is asked for."""
    head = "POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    received = exchange(server, f"{head}Content-Length: 99999999999\r\n{extra}\r\n".encode())
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in received
    assert b"100 Continue" not in received


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/sessions/none", 404, "SESSION_NOT_FOUND"),
        ("/sessions/a%2Fb", 404, "NOT_FOUND"),
        ("/sessions/%2e%2e", 404, "NOT_FOUND"),
        ("/sessions/a%00b", 404, "NOT_FOUND"),
        ("/sessions/%ff", 404, "NOT_FOUND"),
        ("/sessions/%ed%a0%80", 404, "NOT_FOUND"),
        ("/sessions/a%0d%0ab", 422, "VALIDATION_ERROR"),
        ("/sessions/a%20b", 422, "VALIDATION_ERROR"),
        ("/sessions/a%252Fb", 422, "VALIDATION_ERROR"),
        ("/sessions/%zz", 422, "VALIDATION_ERROR"),
        ("/sessions/*", 422, "VALIDATION_ERROR"),
        ("/sessions/a;b=1", 422, "VALIDATION_ERROR"),
        ("/sessions/%F0%9F%98%80", 422, "VALIDATION_ERROR"),
        ("/sessions/" + "a" * 129, 422, "VALIDATION_ERROR"),
        ("/sessions/" + "a" * 10_000, 422, "VALIDATION_ERROR"),
        ("/sessions/-a", 422, "VALIDATION_ERROR"),
        ("/users/%E2%80%A8/sessions", 422, "VALIDATION_ERROR"),
        ("/sessions/s/turns/nope", 422, "VALIDATION_ERROR"),
        (f"/sessions/s/turns/{TURN.upper()}", 422, "VALIDATION_ERROR"),
        (f"/sessions/s/turns/{TURN}", 404, "TURN_NOT_FOUND"),
        (f"/sessions/s/turns/{TURN}/stream", 404, "TURN_NOT_FOUND"),
        ("/sessions/s/checkpoints/nope", 422, "VALIDATION_ERROR"),
        (f"/sessions/s/checkpoints/{TURN.upper()}", 422, "VALIDATION_ERROR"),
        (f"/sessions/s/checkpoints/{TURN}", 404, "CHECKPOINT_NOT_FOUND"),
        ("/sessions/s/checkpoints/latest", 404, "CHECKPOINT_NOT_FOUND"),
        ("/sessions/none/checkpoints", 404, "SESSION_NOT_FOUND"),
        ("/sessions/none/events", 404, "SESSION_NOT_FOUND"),
        ("/sessions/stats/state", 422, "VALIDATION_ERROR"),
        ("/apps/a%2Fb/state", 404, "NOT_FOUND"),
        ("/apps/a%07/state", 422, "VALIDATION_ERROR"),
        ("/apps/" + "a" * 129 + "/state", 422, "VALIDATION_ERROR"),
        ("/users/%E2%80%A8/state", 422, "VALIDATION_ERROR"),
        ("/users/a/state?app_name=", 422, "VALIDATION_ERROR"),
    ],
)
def test_paths(server: HttpServer, path: str, status: int, code: str) -> None:
    """What cannot name anything is not found, what cannot be an id is invalid, both readably."""
    received = exchange(server, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(body)["code"] == code


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=201", "limit=-1", "limit=%2B1", "limit=1_0", "limit=5.0", "limit=", "limit=x",
     "limit=1&limit=2", "limit=" + "9" * 5000, "cursor=", "cursor=%00", "status=gone", "nope=1",
     "user_id=", "user_id=a%2Fb", "user_id=%ff", "user_id=a&user_id=a", "window_id=%0a", "q=" + "x" * 201,
     "include=state"],
)  # fmt: skip
def test_queries(client: httpx2.Client, query: str) -> None:
    """Refused, and what was sent is not repeated."""
    document = problem(client.get(f"/sessions?{query}"), 422, "VALIDATION_ERROR")
    assert document["errors"][0]["field"] in (
        "limit",
        "cursor",
        "status",
        "nope",
        "user_id",
        "query",
        "window_id",
        "q",
        "include",
    )
    assert len(document["detail"]) < 300


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/chat"),
        ("POST", "/chat/stream"),
        ("POST", "/sessions"),
        ("GET", "/users/a/sessions"),
        ("GET", "/sessions/s"),
        ("PATCH", "/sessions/s"),
        ("DELETE", "/sessions/s"),
        ("GET", "/sessions/s/history"),
        ("GET", "/sessions/s/turns"),
        ("GET", "/sessions/s/turns/active"),
        ("GET", f"/sessions/s/turns/{TURN}"),
        ("GET", f"/sessions/s/turns/{TURN}/stream"),
        ("POST", "/sessions/s/cancel"),
        ("GET", "/sessions/stats"),
        ("GET", "/sessions/s/events"),
        ("GET", "/sessions/s/checkpoints"),
        ("POST", "/sessions/s/checkpoints"),
        ("DELETE", "/sessions/s/checkpoints"),
        ("GET", "/sessions/s/checkpoints/latest"),
        ("GET", f"/sessions/s/checkpoints/{TURN}"),
        ("DELETE", f"/sessions/s/checkpoints/{TURN}"),
        ("POST", f"/sessions/s/checkpoints/{TURN}/restore"),
        ("POST", "/sessions/s/rewind"),
        ("POST", "/sessions/s/fork"),
        ("POST", "/sessions/s/regenerate"),
        ("POST", "/sessions/s/compact"),
        ("GET", "/apps/a/state"),
        ("PATCH", "/apps/a/state"),
        ("GET", "/users/a/state"),
        ("PATCH", "/users/a/state"),
        ("GET", "/sessions/s/state"),
        ("PATCH", "/sessions/s/state"),
        ("GET", "/agents"),
        ("GET", "/models"),
        ("GET", "/agent-stats"),
        ("GET", "/agent-sessions"),
        ("DELETE", "/agent-sessions/s"),
        ("POST", "/agent-cleanup"),
        ("GET", "/agent-health"),
    ],
)
def test_unknown_parameters_are_refused_everywhere(client: httpx2.Client, method: str, path: str) -> None:
    """A misspelt parameter is an error, not a surprise."""
    bodies = {"/chat": {"message": "x"}, "/chat/stream": {"message": "x"}, "/sessions/s/rewind": {"turns": 1}}
    body: Any = bodies.get(path, {}) if method in ("POST", "PATCH") else None
    body = {"state": {}} if path.endswith("/state") and method == "PATCH" else body
    document = problem(client.request(method, f"{path}?unknwon=1", json=body), 422, "VALIDATION_ERROR")
    assert [error["field"] for error in document["errors"]] == ["unknwon"]


@pytest.mark.parametrize(
    "value", ["x", "-1", f"{TURN}:", f"{TURN}:-1", f"{TURN}:1.5", f"{TURN}:{'9' * 30}", f"{'0' * 36}:1", "1"]
)
def test_event_ids(client: httpx2.Client, value: str) -> None:
    """A malformed event id, or one of another turn, is refused."""
    path = f"/sessions/s/turns/{TURN}/stream"
    document = problem(client.get(path, headers={"Last-Event-ID": value}), 422, "VALIDATION_ERROR")
    assert document["errors"][0]["field"] == "Last-Event-ID"
    for after in ("-1", "x", "1.0", ""):
        problem(client.get(f"{path}?after={after}"), 422, "VALIDATION_ERROR")


@pytest.mark.parametrize("key", ["", "a b", "k" * 129, "\u00e9"])
def test_idempotency_keys_that_do_not_fit(client: httpx2.Client, key: str) -> None:
    """A key is 1 to 128 visible ASCII characters; another one is refused, and no turn is made."""
    for path in ("/chat", "/chat/stream"):
        headers = {"Idempotency-Key": key.encode()}
        response = client.post(path, json={"session_id": "keyless", "message": "x"}, headers=headers)
        assert problem(response, 422, "VALIDATION_ERROR")["errors"][0]["field"] == "Idempotency-Key"
    problem(client.get("/sessions/keyless"), 404, "SESSION_NOT_FOUND")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"state": []}, "state"),
        ({"state": {"a": "x" * 70_000}}, "state"),
        ({"state": {"temp:x": 1}}, "state.temp:x"),
        ({"state": {"user:" + "x" * 100: 1}}, "state.user:" + "x" * 59 + "…"),
        ({"state": {"app:a.b\n": 1}}, "state.app:a.b?"),
        ({"template": {"name": "x"}}, "template.name"),
        ({"metadata": DEEP}, "metadata" + ".a" * 32),
        ({"metadata": {"list": [DEEP]}}, "metadata.list.0" + ".a" * 30),
        ({"metadata": {"." * 60_000: DEEP}}, "metadata" + "." * 34),
        ({"metadata": {str(n): n for n in range(1001)}}, "metadata"),
        ({"metadata": {"a": "x" * 70_000}}, "metadata"),
        ({"ttl_s": -1}, "ttl_s"),
        ({"title": "x" * 201}, "title"),
        ({"session_id": "stats"}, "session_id"),
    ],
)
def test_session_bodies(client: httpx2.Client, body: dict, field: str) -> None:
    """What a session cannot be made of."""
    document = problem(client.post("/sessions", json=body), 422, "VALIDATION_ERROR")
    assert [error["field"] for error in document["errors"]] == [field]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("checkpoints", {"label": ""}, "label"),
        ("checkpoints", {"label": "a\nb"}, "label"),
        ("checkpoints", {"label": "x" * 201}, "label"),
        ("checkpoints", {"label": 7}, "label"),
        ("checkpoints", {"data": []}, "data"),
        ("checkpoints", {"data": {"a": "x" * 262_137}}, "data"),
        ("checkpoints", {"data": {str(n): n for n in range(1001)}}, "data"),
        ("checkpoints", {"data": DEEP}, "data" + ".a" * 32),
        ("checkpoints", {"name": "x"}, "name"),
        ("checkpoints", [], "body"),
        (f"checkpoints/{TURN}/restore", {"on_busy": "merge"}, "on_busy"),
        (f"checkpoints/{TURN}/restore", {"turns": 1}, "turns"),
        ("checkpoints/latest/restore", {}, "checkpoint_id"),
        ("rewind", None, "body"),
        ("rewind", {}, "body"),
        ("rewind", {"turn_id": None, "turns": None}, "body"),
        ("rewind", {"turn_id": TURN, "turns": 1}, "turns"),
        ("rewind", {"turn_id": "root"}, "turn_id"),
        ("rewind", {"turn_id": TURN.upper()}, "turn_id"),
        ("rewind", {"turns": 0}, "turns"),
        ("rewind", {"turns": -1}, "turns"),
        ("rewind", {"turns": 1.0}, "turns"),
        ("rewind", {"turns": True}, "turns"),
        ("rewind", {"turns": "1"}, "turns"),
        ("rewind", {"turns": 2**53}, "turns"),
        ("rewind", {"turns": 2**60}, "turns"),
        ("rewind", {"turns": 1, "on_busy": "wait"}, "on_busy"),
        ("rewind", {"turns": 1, "x": 1}, "x"),
        ("fork", {"turn_id": TURN, "checkpoint_id": TURN}, "turn_id"),
        ("fork", {"turn_id": "x"}, "turn_id"),
        ("fork", {"checkpoint_id": "latest"}, "checkpoint_id"),
        ("fork", {"session_id": "a/b"}, "session_id"),
        ("fork", {"session_id": "stats"}, "session_id"),
        ("fork", {"session_id": "a", "conversation_id": "b"}, "conversation_id"),
        ("fork", {"metadata": {"a": "x" * 70_000}}, "metadata"),
        ("fork", {"title": "x"}, "title"),
        ("regenerate", {"message": "x"}, "message"),
        ("regenerate", {"parent": "root"}, "parent"),
        ("regenerate", {"user_id": "alice"}, "user_id"),
        ("regenerate", {"metadata": {}}, "metadata"),
        ("regenerate", {"model": "a", "model_name": "b"}, "model_name"),
        ("regenerate", {"params": {"temperature": 3}}, "params.temperature"),
        ("regenerate", {"on_disconnect": "stop"}, "on_disconnect"),
        ("compact", {"on_busy": 1}, "on_busy"),
        ("compact", {"turn_id": TURN}, "turn_id"),
    ],
)
def test_branch_bodies(client: httpx2.Client, path: str, body: object, field: str) -> None:
    """What cannot move, name, copy or answer anew: refused at the one field that does not fit."""
    response = client.post(f"/sessions/s/{path}", json=body)
    document = problem(response, 422, "VALIDATION_ERROR")
    assert [error["field"] for error in document["errors"]] == [field]


@pytest.mark.parametrize(
    "path", ["/sessions", "/sessions/s/turns", "/sessions/s/checkpoints", "/users/u/sessions"]
)
@pytest.mark.parametrize(
    "query", ["limit=0", "limit=201", "limit=1&limit=2", "limit=1_000", "limit=%2B1", "limit=1.0", "cursor=x"]
)
def test_pages_that_do_not_fit(client: httpx2.Client, path: str, query: str) -> None:
    """The rules of ``limit`` and ``cursor`` are the same for every list."""
    document = problem(client.get(f"{path}?{query}"), 422, "VALIDATION_ERROR")
    assert [error["field"] for error in document["errors"]] == [query.partition("=")[0]]


def test_a_cursor_of_another_list(client: httpx2.Client) -> None:
    """A cursor is good for the query that it came from, and for no other one."""
    for name in ("p1", "p2", "p3"):
        client.post("/sessions", json={"session_id": name, "user_id": "pages"})
        client.post("/sessions/p1/checkpoints")
        client.post("/sessions/p2/checkpoints")
        client.post("/chat", json={"session_id": "p1", "message": "x"})
    lists = (
        "/sessions?user_id=pages&limit=1",
        "/sessions?user_id=pages&agent_id=assistant&limit=1",
        "/sessions/p1/checkpoints?limit=1",
        "/sessions/p1/turns?limit=1",
    )
    cursors = {path: client.get(path).json()["next_cursor"] for path in lists}
    assert all(cursors.values())
    for path in (*lists, *(path.replace("p1", "p2") for path in lists), "/sessions?limit=1"):
        for origin, cursor in cursors.items():
            response = client.get(f"{path}&cursor={cursor}")
            if origin == path:
                assert response.status_code == 200
            else:
                assert problem(response, 422, "VALIDATION_ERROR")["errors"][0]["field"] == "cursor"
    first = cursors["/sessions?user_id=pages&limit=1"]
    problem(client.get(f"/sessions?user_id=pages&status=active&cursor={first}"), 422, "VALIDATION_ERROR")
    assert client.get(f"/sessions?limit=7&user_id=pages&q=&cursor={first}").status_code == 200


def test_everything_wrong_at_once_is_told_at_once(client: httpx2.Client) -> None:
    """All fields are named, in a stable order."""
    body = {"message": 1, "session_id": "a b", "params": {"seed": "x"}, "zzz": 1}
    first = problem(client.post("/chat", json=body), 422, "VALIDATION_ERROR")
    second = problem(client.post("/chat", json=body), 422, "VALIDATION_ERROR")
    assert [error["field"] for error in first["errors"]] == ["session_id", "params.seed", "message", "zzz"]
    assert first["errors"] == second["errors"]


def test_the_server_still_works(client: httpx2.Client) -> None:
    """After all that."""
    assert client.post("/chat", json={"message": "你好"}).status_code == 200
