"""What does not fit is refused at the field that does not fit, in the words of that field."""

from collections.abc import Iterator

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


@pytest.mark.parametrize("path", ["/chat", "/chat/stream", "/api/chat"])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"message":"x","session_id":"a/b"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","session_id":"batch-delete"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","user_id":"a\\u0007"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","on_busy":"merge"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","on_disconnect":"stop"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","parent":"head"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","parent":"0199C1F2-7D1A-7B3E-8C55-3F0E9D2B6A11"}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","parent":["root"]}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","params":{"temperature":3}}', 422, "VALIDATION_ERROR"),
        (b'{"message":"x","model":"nothing"}', 422, "UNKNOWN_MODEL"),
        (b'{"message":"x","provider":"nobody"}', 422, "UNKNOWN_MODEL"),
        (b'{"message":"x","agent_id":"nobody"}', 404, "AGENT_NOT_FOUND"),
    ],
)
def test_chat_bodies(client: httpx2.Client, path: str, body: bytes, status: int, code: str) -> None:
    """The right refusal, the same for both ways to chat, without the input in it."""
    document = problem(client.post(path, content=body, headers=JSON), status, code)
    if code == "VALIDATION_ERROR":
        assert document["errors"]
        assert all(set(error) == {"field", "message"} for error in document["errors"])


def test_the_longest_message_passes(client: httpx2.Client) -> None:
    """100,000 characters, three bytes each, are within every limit."""
    assert client.post("/chat", json={"message": "长" * 100_000}).status_code == 200


def test_an_unknown_fields_name_is_cut(client: httpx2.Client) -> None:
    """A key of any length and content makes a short, printable name."""
    document = problem(client.post("/chat", json={"message": "x", "k\n" * 5000: 1}), 422, "VALIDATION_ERROR")
    assert len(document["errors"][0]["field"]) < 80
    assert "\n" not in document["errors"][0]["field"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/sessions/none", 404, "SESSION_NOT_FOUND"),
        ("/sessions/a%20b", 422, "VALIDATION_ERROR"),
        ("/sessions/" + "a" * 129, 422, "VALIDATION_ERROR"),
        ("/sessions/-a", 422, "VALIDATION_ERROR"),
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
        ("/apps/" + "a" * 129 + "/state", 422, "VALIDATION_ERROR"),
        ("/users/a/state?app_name=", 422, "VALIDATION_ERROR"),
    ],
)
def test_ids_in_paths(client: httpx2.Client, path: str, status: int, code: str) -> None:
    """What cannot be an id is invalid; what can and is none is not found, by its own name."""
    problem(client.get(path), status, code)


@pytest.mark.parametrize(
    "query",
    ["status=gone", "user_id=", "user_id=a%2Fb", "window_id=%0a", "q=" + "x" * 201, "include=state"],
)
def test_filters(client: httpx2.Client, query: str) -> None:
    """Refused at the filter, and what was sent is not repeated."""
    document = problem(client.get(f"/sessions?{query}"), 422, "VALIDATION_ERROR")
    assert [error["field"] for error in document["errors"]] == [query.partition("=")[0]]
    assert len(document["detail"]) < 300


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
