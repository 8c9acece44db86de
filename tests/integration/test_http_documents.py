"""The curl examples of the five documents, as they are written; only host and port differ."""

from collections.abc import Iterator

import httpx2
import pytest

from tests.integration.test_http_server import HttpServer


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with HttpServer() as server:
        yield server.client


def post(client: httpx2.Client, path: str, body: str) -> httpx2.Response:
    return client.post(path, content=body.encode(), headers={"Content-Type": "application/json"})


def test_multi_window_guide(client: httpx2.Client) -> None:
    """Create a session for a user's window, chat in it, list the user's sessions as a bare list."""
    created = post(client, "/sessions", '{"user_id": "alice", "window_id": "desktop"}')
    assert created.status_code == 201
    session_id = created.json()["session_id"]
    answer = post(client, "/chat", f'{{"session_id": "{session_id}", "message": "你好"}}')
    assert answer.status_code == 200
    listed = client.get("/users/alice/sessions").json()
    assert [(one["session_id"], one["window_id"]) for one in listed] == [(session_id, "desktop")]


def test_autogen_sessions_document(client: httpx2.Client) -> None:
    """The stream names its session in a header, the second request remembers the first."""
    body = '{\n    "message": "你好，我叫张三",\n    "conversation_id": "user_001"\n  }'
    first = post(client, "/api/chat/stream", body)
    assert first.headers["X-Session-ID"] == "user_001"
    second = post(
        client,
        "/api/chat/stream",
        '{\n    "message": "我叫什么名字？",\n    "conversation_id": "user_001"\n  }',
    )
    assert "张三" in second.text
    plain = post(client, "/api/chat", '{"message": "你好", "conversation_id": "user_002"}')
    assert plain.status_code == 200
    listed = client.get("/api/sessions").json()["sessions"]
    assert {one["session_id"] for one in listed} == {"user_001", "user_002"}
    one = client.get("/api/sessions/user_001").json()
    assert {"session_id", "created_at", "last_accessed", "message_count"} <= set(one)
    assert one["message_count"] == 4
    deleted = client.delete("/api/sessions/user_001")
    assert deleted.status_code == 200
    assert deleted.json()["session_id"] == "user_001"
    assert deleted.json()["message"]
    assert client.get("/api/sessions/user_001").status_code == 404
    health = client.get("/health").json()
    assert (health["status"], health["agent_initialized"], health["session_count"]) == ("healthy", True, 1)


def test_isolation_of_two_conversations(client: httpx2.Client) -> None:
    """What one session was told the other does not know."""
    post(client, "/api/chat", '{"message": "我叫张三", "conversation_id": "test_1"}')
    knows = post(client, "/api/chat", '{"message": "我叫什么？", "conversation_id": "test_1"}').json()
    assert "张三" in knows["reply"]
    other = post(client, "/api/chat", '{"message": "我叫什么？", "conversation_id": "test_2"}').json()
    assert "张三" not in other["reply"]


def test_agent_pool_document(client: httpx2.Client) -> None:
    """The five routes for operators, below the prefix that the document uses."""
    post(client, "/agent_backend/chat", '{"session_id": "u1", "message": "你好"}')
    stats = client.get("/agent_backend/agent-stats").json()
    shown = {"total_agents", "active_agents", "idle_agents", "max_agents", "agent_ttl"}
    assert {name: stats[name] for name in shown} == {
        "total_agents": 1,
        "active_agents": 0,
        "idle_agents": 1,
        "max_agents": 100,
        "agent_ttl": 3600,
    }
    live = client.get("/agent_backend/agent-sessions").json()
    assert [one["session_id"] for one in live["sessions"]] == ["u1"]
    assert client.get("/agent_backend/agent-health").json()["status"] == "healthy"
    assert client.post("/agent_backend/agent-cleanup").status_code == 200
    assert client.delete("/agent_backend/agent-sessions/u1").status_code == 200
    assert client.get("/agent_backend/agent-stats").json()["total_agents"] == 0
