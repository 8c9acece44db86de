"""Sessions created in batches, and a user's cap: who goes, who is refused, and never one too many."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.integration.test_http_chat import STALL, Chat, Stream, says
from tests.integration.test_http_server import HttpServer, problem
from tests.integration.test_policies import settings_for
from tests.modelserver import ModelServer


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with HttpServer() as server:
        yield server.client


@pytest.fixture
def models() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


def ids_of(client: httpx2.Client, user_id: str = "alice") -> list[str]:
    return [one["session_id"] for one in client.get(f"/users/{user_id}/sessions?limit=200").json()]


def make(client: httpx2.Client, *session_ids: str, **values: Any) -> list[int]:
    bodies = [{"user_id": "alice", "session_id": session_id, **values} for session_id in session_ids]
    return [client.post("/sessions", json=body).status_code for body in bodies]


def test_a_batch(client: httpx2.Client) -> None:
    """Each entry's outcome in its place; a refused one does not stop the others."""
    make(client, "taken")
    entries: list[dict[str, Any]] = [
        {"session_id": "a", "user_id": "alice", "title": "t", "metadata": {"password": "p"}},
        {"session_id": "taken"},
        {"agent_id": "nobody"},
        {"model": "nothing"},
        {"conversation_id": "a"},
        {},
    ]
    response = client.post("/api/sessions/batch", json={"sessions": entries})
    results = response.json()["results"]
    assert response.status_code == 200
    assert results[0] == {"session_id": "a"}
    codes = [result["error"]["code"] for result in results[1:5]]
    assert codes == ["SESSION_EXISTS", "AGENT_NOT_FOUND", "UNKNOWN_MODEL", "SESSION_EXISTS"]
    assert all(list(result) == ["error"] for result in results[1:5])
    assert client.get(f"/sessions/{results[5]['session_id']}").json()["user_id"] is None
    made = client.get("/sessions/a").json()
    assert (made["title"], made["metadata"]) == ("t", {"password": "[redacted]"})


def test_the_size_of_a_batch(client: httpx2.Client) -> None:
    """None to a thousand; what is not a list of objects refuses the whole batch."""
    assert client.post("/sessions/batch", json={"sessions": []}).json() == {"results": []}
    many = [{"session_id": f"s{number}", "user_id": "alice"} for number in range(1001)]
    problem(client.post("/sessions/batch", json={"sessions": many}), 422, "VALIDATION_ERROR")
    results = client.post("/sessions/batch", json={"sessions": many[:1000]}).json()["results"]
    assert results == [{"session_id": entry["session_id"]} for entry in many[:1000]]
    problem(client.post("/sessions/batch", json={"sessions": {}}), 422, "VALIDATION_ERROR")
    assert client.get("/health").json()["session_count"] == 1000


def test_a_bad_entry_fails_alone(client: httpx2.Client) -> None:
    """What does not fit is told for each entry, with its field; the others are made."""
    entries: list[Any] = [
        {"session_id": "good"},
        {"session_id": "a b"},
        {"ttl_s": -1, "surprise": 1},
        {"state": {"user:x": 1}},
        "nonsense",
        {"template": {"capabilities": ["unknown"]}},
        {"session_id": "fine"},
    ]
    results = client.post("/sessions/batch", json={"sessions": entries}).json()["results"]
    assert [r.get("session_id") for r in results] == ["good", *[None] * 5, "fine"]
    errors = [r["error"] for r in results[1:-1]]
    assert {error["code"] for error in errors} == {"VALIDATION_ERROR"}
    fields = [[entry["field"] for entry in error["errors"]] for error in errors]
    assert fields == [
        ["session_id"],
        ["ttl_s", "surprise"],
        ["state.user:x"],
        ["entry"],
        ["template.capabilities"],
    ]


def test_the_oldest_goes() -> None:
    """The one whose last activity is longest ago, with its live agent; others' and nobody's stay."""
    with HttpServer(session_max_per_user=3) as server:
        client = server.client
        make(client, "bobs", user_id="bob")
        client.post("/sessions", json={"session_id": "nobodys"})
        make(client, "a", "b", "c")
        for name in ("b", "a"):
            client.post("/chat", json={"session_id": name, "message": "hi"})
        assert make(client, "d") == [201]
        assert ids_of(client) == ["d", "a", "b"]
        assert client.get("/agent-stats").json()["total_agents"] == 2
        chat = {"session_id": "e", "user_id": "alice", "message": "hi"}
        assert client.post("/chat", json=chat).status_code == 200
        assert ids_of(client) == ["e", "d", "a"]
        assert client.get("/agent-stats").json()["total_agents"] == 2
        problem(client.get("/sessions/b"), 404, "SESSION_NOT_FOUND")
        assert client.get("/health").json()["session_count"] == 5


def test_a_taken_id_evicts_nobody() -> None:
    """A session that cannot be made takes nobody's place."""
    with HttpServer(session_max_per_user=2) as server:
        assert make(server.client, "a", "b", "a") == [201, 201, 409]
        assert ids_of(server.client) == ["b", "a"]


def test_reject() -> None:
    """At the cap the next is refused, however it comes; a place that is freed can be taken."""
    with HttpServer(session_max_per_user=2, session_limit_policy="reject") as server:
        client = server.client
        body = {"user_id": "alice"}
        assert make(client, "a", "b") == [201, 201]
        refused = client.post("/sessions", json=body)
        problem(refused, 429, "SESSION_LIMIT")
        assert int(refused.headers["retry-after"]) >= 1
        problem(client.post("/chat", json={**body, "message": "hi"}), 429, "SESSION_LIMIT")
        problem(client.post("/sessions/resume", json={**body, "window_id": "w"}), 429, "SESSION_LIMIT")
        results = client.post("/sessions/batch", json={"sessions": [body, {}]}).json()["results"]
        assert results[0]["error"]["code"] == "SESSION_LIMIT"
        assert "session_id" in results[1]
        client.delete("/sessions/a")
        assert make(client, "c", "d") == [201, 429]
        assert ids_of(client) == ["c", "b"]


def test_a_batch_keeps_to_the_cap() -> None:
    """Its entries take the places of older sessions, not of each other; what is left over is refused."""
    with HttpServer(session_max_per_user=3) as server:
        make(server.client, "a", "b")
        entries = [{"session_id": f"n{number}", "user_id": "alice"} for number in range(5)]
        results = server.client.post("/sessions/batch", json={"sessions": entries}).json()["results"]
        assert [result.get("session_id") for result in results] == ["n0", "n1", "n2", None, None]
        assert {result["error"]["code"] for result in results[3:]} == {"SESSION_LIMIT"}
        assert set(ids_of(server.client)) == {"n0", "n1", "n2"}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("policy", ["evict_oldest", "reject"])
def test_fifty_at_once(tmp_path: Path, kind: str, policy: str) -> None:
    """Of fifty simultaneous creations, by hand, by chat and in batches, the cap is exact at the end."""
    url = "memory://" if kind == "memory" else f"sqlite:///{tmp_path}/agentpool.db"
    with HttpServer(store_url=url, session_max_per_user=5, session_limit_policy=policy) as server:

        def create(number: int) -> int:
            one = {"user_id": "alice"}
            if number % 10 == 0:
                return server.client.post("/sessions/batch", json={"sessions": [one, one]}).status_code
            if number % 13 == 1:  # four: fewer than the cap, so that one session can always go
                return server.client.post("/chat", json={**one, "message": "hi"}).status_code
            return server.client.post("/sessions", json=one).status_code

        with ThreadPoolExecutor(50) as people:
            answers = list(people.map(create, range(50)))
        assert len(ids_of(server.client)) == 5
        assert server.client.get("/health").json()["session_count"] == 5
        assert set(answers) <= ({200, 201} if policy == "evict_oldest" else {200, 201, 429})


def test_a_session_with_a_turn_is_spared(models: ModelServer) -> None:
    """Neither one that runs nor one that waits goes; when there is no other, the new one is refused."""
    settings = {"session_max_per_user": 2, "agent_max_instances": 1, "agent_capacity_wait_s": 60}
    with HttpServer(**settings_for(models, **settings)) as server, ExitStack() as open_streams:
        chat = Chat(server, models)
        open_streams.callback(chat.close)
        make(chat.client, "runs", "waits")
        stream = Stream(open_streams.enter_context(chat.stream(STALL, "runs")))
        stream.next()
        waiting = chat.saying(says("later"), session_id="waits")
        chat.until(lambda: chat.client.get("/agent-stats").json()["waiting"])
        refused = chat.client.post("/sessions", json={"user_id": "alice"})
        problem(refused, 429, "SESSION_LIMIT")
        assert set(ids_of(chat.client)) == {"runs", "waits"}
        chat.client.post("/sessions/runs/cancel", json={"keep_partial": False})
        assert waiting.result(10).status_code == 200
        assert make(chat.client, "next") == [201]
        assert len(ids_of(chat.client)) == 2
