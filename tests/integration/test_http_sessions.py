"""Sessions over HTTP: make, list, read, change, delete."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.integration.test_http_server import HttpServer, problem

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
FIELDS = [
    "session_id",
    "app_name",
    "user_id",
    "window_id",
    "agent_id",
    "title",
    "status",
    "created_at",
    "updated_at",
    "last_accessed",
    "expires_at",
    "message_count",
    "turn_count",
    "head",
    "provider",
    "model",
    "params",
    "metadata",
    "live",
]


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with HttpServer() as server:
        yield server.client


def test_a_created_session(client: httpx2.Client) -> None:
    """201 with all fields, in the contract's order, and the way to it."""
    response = client.post(
        "/sessions",
        json={
            "session_id": "s1",
            "user_id": "alice",
            "window_id": "desktop",
            "app_name": "shop",
            "agent_id": "assistant",
            "title": "标题",
            "metadata": {"language": "zh-CN", "password": "p"},
            "params": {"temperature": 0.2, "stop": "END"},
            "ttl_s": 60,
        },
    )
    assert response.status_code == 201
    assert response.headers["location"] == "/sessions/s1"
    assert response.headers["etag"] == '"0.1"'
    session = response.json()
    assert list(session) == FIELDS
    assert session["metadata"] == {"language": "zh-CN", "password": "[redacted]"}
    assert session["params"] == {"temperature": 0.2, "stop": ["END"]}
    assert (session["status"], session["live"], session["head"]) == ("active", False, None)
    assert (session["message_count"], session["turn_count"]) == (0, 0)
    for name in ("created_at", "updated_at", "last_accessed", "expires_at"):
        assert TIME.fullmatch(session[name])
    assert client.get("/sessions/s1").json() == session


def test_a_session_of_no_name(client: httpx2.Client) -> None:
    """No body at all makes a session with a UUIDv7, of nobody."""
    session = client.post("/sessions").json()
    assert UUID7.fullmatch(session["session_id"])
    assert session["user_id"] is None


def test_an_id_can_be_taken_once(client: httpx2.Client) -> None:
    """The second is refused, the first stays."""
    client.post("/sessions", json={"session_id": "s", "title": "first"})
    problem(client.post("/sessions", json={"conversation_id": "s"}), 409, "SESSION_EXISTS")
    assert client.get("/sessions/s").json()["title"] == "first"


def test_unknown_choices(client: httpx2.Client) -> None:
    """Agents and models must be offered."""
    problem(client.post("/sessions", json={"agent_id": "nobody"}), 404, "AGENT_NOT_FOUND")
    problem(client.post("/sessions", json={"provider": "nobody"}), 422, "UNKNOWN_MODEL")
    problem(client.post("/sessions", json={"model_name": "nothing"}), 422, "UNKNOWN_MODEL")


def test_what_clients_may_choose(client: httpx2.Client) -> None:
    """The lists of agents and models have the shape of every list."""
    agents, models = client.get("/agents").json(), client.get("/models").json()
    assert agents["agents"][0]["agent_id"] == "assistant"
    assert {"provider": "demo", "model": "demo", "is_default": True} in models["models"]
    assert (agents["total"], agents["next_cursor"]) == (1, None)


def test_what_an_agents_profile_says(tmp_path: Path) -> None:
    """Parameters, context policy and tool rounds of the file; ``null`` where the server decides."""
    profiles = {
        "short": {"context_policy": "last:40", "max_tool_iterations": 3, "params": {"temperature": 0.5}},
        "long": {"context_policy": "tokens:8000"},
        "whole": {"context_policy": "all"},
    }
    file = tmp_path / "agents.json"
    file.write_text(json.dumps({"agents": profiles}))
    with HttpServer(agents_file=str(file)) as server:
        agents = {one.pop("agent_id"): one for one in server.client.get("/agents").json()["agents"]}
    assert list(agents["short"]) == [
        "name",
        "description",
        "provider",
        "model",
        "params",
        "tools",
        "context_policy",
        "max_tool_iterations",
    ]
    names = ("context_policy", "max_tool_iterations", "params")
    told = {agent_id: tuple(agents[agent_id][name] for name in names) for agent_id in agents}
    assert told == {
        "assistant": (None, None, {}),
        "short": ("last:40", 3, {"temperature": 0.5}),
        "long": ("tokens:8000", None, {}),
        "whole": ("all", None, {}),
    }


def test_lists_page_by_cursor(client: httpx2.Client) -> None:
    """Every session once, newest activity first, whatever the page size."""
    for n in range(5):
        client.post("/sessions", json={"session_id": f"s{n}", "user_id": "alice"})
    seen, cursor = [], None
    while True:
        page = client.get("/sessions", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        assert page["total"] == 5
        seen += [one["session_id"] for one in page["sessions"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ["s4", "s3", "s2", "s1", "s0"]
    problem(client.get("/sessions?cursor=nonsense!"), 422, "VALIDATION_ERROR")


def test_a_users_sessions_are_a_bare_list(client: httpx2.Client) -> None:
    """The next page is named in ``Link``, below the prefix that was used."""
    for n in range(3):
        client.post("/sessions", json={"session_id": f"s{n}", "user_id": "张 三"})
    client.post("/sessions", json={"session_id": "other", "user_id": "bob"})
    path, seen = "/api/users/%E5%BC%A0%20%E4%B8%89/sessions?limit=2", []
    while path:
        response = client.get(path)
        seen += [one["session_id"] for one in response.json()]
        link = re.fullmatch(r'<([^>]+)>; rel="next"', response.headers.get("link", ""))
        path = link[1] if link else ""
        assert not path or path.startswith("/api/users/%E5%BC%A0%20%E4%B8%89/sessions?")
    assert seen == ["s2", "s1", "s0"]
    assert client.get("/users/nobody/sessions").json() == []


def test_filters(client: httpx2.Client) -> None:
    """Each filter narrows the list; an empty ``q`` is none."""
    client.post("/sessions", json={"session_id": "a1", "user_id": "u", "window_id": "w", "title": "Weather"})
    client.post("/sessions", json={"session_id": "b1", "title": "other"})
    client.patch("/sessions/b1", json={"status": "archived"})

    def found(query: str) -> list[str]:
        return [one["session_id"] for one in client.get(f"/sessions?{query}").json()["sessions"]]

    assert found("user_id=u") == ["a1"]
    assert found("window_id=w") == ["a1"]
    assert found("status=archived") == ["b1"]
    assert found("status=active") == ["a1"]
    assert found("q=WEATH") == ["a1"]
    assert found("q=b") == ["b1"]
    assert found("agent_id=assistant&user_id=u") == ["a1"]
    assert len(found("q=")) == 2


def test_head_is_get_without_a_body(client: httpx2.Client) -> None:
    """Same status, same headers, no body; for missing ones, too."""
    client.post("/sessions", json={"session_id": "s"})
    got, head = client.get("/sessions/s"), client.head("/sessions/s")
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["etag"] == got.headers["etag"]
    assert client.head("/sessions/none").status_code == 404


def test_a_patch_merges(client: httpx2.Client) -> None:
    """``null`` takes away, what is left out stays, the tag moves."""
    client.post(
        "/sessions", json={"session_id": "s", "title": "t", "metadata": {"a": 1, "b": {"c": 2, "d": 3}}}
    )
    response = client.patch("/sessions/s", json={"title": None, "metadata": {"a": None, "b": {"c": 9}}})
    assert response.headers["etag"] == '"0.2"'
    assert response.json()["title"] is None
    assert response.json()["metadata"] == {"b": {"c": 9, "d": 3}}
    assert client.patch("/sessions/s", json={"metadata": None}).json()["metadata"] == {}


def test_if_match(client: httpx2.Client) -> None:
    """The whole tag is compared; a weak one never matches; ``*`` matches always."""
    client.post("/sessions", json={"session_id": "s"})

    def patch(tag: str) -> httpx2.Response:
        return client.patch("/sessions/s", json={"title": "x"}, headers={"If-Match": tag})

    assert patch('"0.1"').status_code == 200
    problem(patch('"0.1"'), 412, "PRECONDITION_FAILED")
    problem(patch('W/"0.2"'), 412, "PRECONDITION_FAILED")
    assert patch("*").status_code == 200
    problem(patch('"0.3", "0.4"'), 422, "VALIDATION_ERROR")


def test_chat_expects_a_head(client: httpx2.Client) -> None:
    """Chat compares the head part of ``If-Match`` only, when the turn starts."""

    def say(tag: str) -> httpx2.Response:
        body = {"session_id": "s", "message": "hello"}
        return client.post("/chat", json=body, headers={"If-Match": tag})

    head = say('"0.1"').json()["head"]
    client.patch("/sessions/s", json={"title": "a new revision"})
    document = problem(say('"0.2"'), 409, "HEAD_MOVED")
    assert document["session_id"] == "s"
    assert say(f'"{head}.1"').status_code == 200
    problem(say(f'"{head}.2"'), 409, "HEAD_MOVED")
    assert say("*").status_code == 200
    problem(say('"0.1", "0.2"'), 422, "VALIDATION_ERROR")


def test_params_are_merged(client: httpx2.Client) -> None:
    """PATCH merges ``params``; null removes one, or all; chat replaces them as a whole."""
    client.post("/sessions", json={"session_id": "s", "params": {"seed": 7, "top_p": 0.5}})

    def patch(params: object) -> object:
        return client.patch("/sessions/s", json={"params": params}).json()["params"]

    assert patch({"temperature": 0.2, "seed": None}) == {"top_p": 0.5, "temperature": 0.2}
    client.post("/chat", json={"session_id": "s", "message": "hello", "params": {"seed": 1}})
    assert client.get("/sessions/s").json()["params"] == {"seed": 1}
    assert patch(None) == {}


def test_status_by_hand(client: httpx2.Client) -> None:
    """Archived never expires and refuses chat; active revives it."""
    client.post("/sessions", json={"session_id": "s"})
    archived = client.patch("/sessions/s", json={"status": "archived"}).json()
    assert (archived["status"], archived["expires_at"]) == ("archived", None)
    problem(client.post("/chat", json={"session_id": "s", "message": "x"}), 409, "SESSION_ARCHIVED")
    assert client.patch("/sessions/s", json={"status": "active"}).json()["status"] == "active"
    assert client.patch("/sessions/s", json={"status": "idle"}).json()["status"] == "idle"
    assert client.post("/chat", json={"session_id": "s", "message": "x"}).status_code == 200


def test_deleted_is_gone(client: httpx2.Client) -> None:
    """Afterwards every route of the session answers 404."""
    client.post("/sessions", json={"session_id": "s"})
    assert client.delete("/sessions/s").json() == {"message": "Session deleted", "session_id": "s"}
    for method, path in (
        ("GET", "/sessions/s"),
        ("DELETE", "/sessions/s"),
        ("GET", "/sessions/s/history"),
        ("GET", "/sessions/s/turns"),
        ("GET", "/sessions/s/turns/active"),
        ("POST", "/sessions/s/cancel"),
    ):
        problem(client.request(method, path), 404, "SESSION_NOT_FOUND")
    problem(client.patch("/sessions/s", json={"title": "x"}), 404, "SESSION_NOT_FOUND")


def test_another_users_session_is_as_good_as_none(client: httpx2.Client) -> None:
    """A wrong ``user_id`` cannot be told from a missing session; left out it is accepted."""
    client.post("/sessions", json={"session_id": "s", "user_id": "alice"})
    wrong = client.get("/sessions/s?user_id=bob").json()
    missing = client.get("/sessions/t?user_id=bob").json()
    for document in (wrong, missing):
        for name in ("request_id", "instance", "session_id"):
            del document[name]
    assert wrong == missing
    for method, path in (
        ("GET", "/sessions/s"),
        ("DELETE", "/sessions/s"),
        ("GET", "/sessions/s/history"),
        ("GET", "/sessions/s/turns"),
        ("GET", "/sessions/s/turns/active"),
        ("POST", "/sessions/s/cancel"),
    ):
        problem(client.request(method, f"{path}?user_id=bob"), 404, "SESSION_NOT_FOUND")
    problem(client.patch("/sessions/s?user_id=bob", json={}), 404, "SESSION_NOT_FOUND")
    body = {"session_id": "s", "message": "x", "user_id": "bob"}
    problem(client.post("/chat", json=body), 404, "SESSION_NOT_FOUND")
    problem(client.post("/chat/stream", json=body), 404, "SESSION_NOT_FOUND")
    assert client.get("/sessions/s?user_id=alice").status_code == 200
    assert client.get("/sessions/s").status_code == 200


def test_history_pages_in_whole_turns(client: httpx2.Client) -> None:
    """The newest page first, each ascending; ``limit`` counts messages."""
    for n in range(3):
        client.post("/chat", json={"session_id": "s", "message": f"m{n}"})
    newest = client.get("/sessions/s/history?limit=4").json()
    assert [m["role"] for m in newest["messages"]] == ["user", "assistant"] * 2
    assert [m["content"] for m in newest["messages"][::2]] == ["m1", "m2"]
    assert all(set(m) == {"role", "content", "turn_id", "created_at"} for m in newest["messages"])
    oldest = client.get(f"/sessions/s/history?limit=3&before={newest['next_before']}").json()
    assert [m["content"] for m in oldest["messages"][::2]] == ["m0"]
    assert oldest["next_before"] is None
    stranger = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"
    problem(client.get(f"/sessions/s/history?before={stranger}"), 404, "TURN_NOT_FOUND")
    problem(client.get("/sessions/s/history?before=x"), 422, "VALIDATION_ERROR")


def test_turns_are_listed_newest_first(client: httpx2.Client) -> None:
    """The list pages by cursor; each turn can be read by itself."""
    ids = [
        client.post("/chat", json={"session_id": "s", "message": f"m{n}"}).json()["turn_id"] for n in range(3)
    ]
    page = client.get("/sessions/s/turns?limit=2").json()
    assert page["total"] == 3
    rest = client.get(f"/sessions/s/turns?limit=2&cursor={page['next_cursor']}").json()
    turns = page["turns"] + rest["turns"]
    assert [turn["turn_id"] for turn in turns] == ids[::-1]
    assert [turn["parent"] for turn in turns] == [ids[1], ids[0], None]
    assert client.get(f"/sessions/s/turns/{ids[0]}").json() == turns[2]
    assert set(turns[0]) == {
        "turn_id",
        "parent",
        "status",
        "input",
        "reply",
        "usage",
        "error",
        "started_at",
        "finished_at",
        "on_branch",
    }
    assert turns[0]["status"] == "finished"
    assert turns[0]["on_branch"] is True
    stranger = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"
    problem(client.get(f"/sessions/s/turns/{stranger}"), 404, "TURN_NOT_FOUND")
    problem(client.get("/sessions/s/turns/x"), 422, "VALIDATION_ERROR")
