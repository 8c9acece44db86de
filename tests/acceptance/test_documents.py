"""The HTTP examples of the five documents, replayed against a real server with the paths as written.

Only host and port differ. The documented fields must be there; more may be.
"""

import re

import pytest

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\Z")


# -- first document: sessions of users and windows ----------------------------------------


def test_first_document_creates_a_session_and_chats(server):
    """POST /sessions, then POST /chat with its id, then the user's sessions as a bare array."""
    created = server.request("POST", "/sessions", {"user_id": "alice", "window_id": "desktop"})
    assert created.status == 201
    session_id = created.body["session_id"]
    answer = server.request("POST", "/chat", {"session_id": session_id, "message": "你好"})
    assert answer.status == 200
    assert answer.body["session_id"] == session_id
    assert answer.body["reply"]
    listed = server.request("GET", "/users/alice/sessions")
    assert listed.status == 200
    (session,) = listed.body
    assert (session["session_id"], session["user_id"], session["window_id"]) == (
        session_id,
        "alice",
        "desktop",
    )
    assert session["message_count"] == 2


def test_first_document_keeps_two_windows_of_a_user_apart(server):
    """The same user's desktop and phone are two conversations."""
    windows = {
        window: server.request("POST", "/sessions", {"user_id": "carol", "window_id": window}).body[
            "session_id"
        ]
        for window in ("desktop_browser", "mobile_app")
    }
    for window, session_id in windows.items():
        server.request("POST", "/chat", {"session_id": session_id, "message": f"My name is {window.title()}"})
    for window, session_id in windows.items():
        reply = server.request(
            "POST", "/chat", {"session_id": session_id, "message": "What is my name?"}
        ).body["reply"]
        other = next(w for w in windows if w != window)
        assert window.split("_")[0].title() in reply
        assert other.split("_")[0].title() not in reply


# -- third document: isolation, word for word ------------------------------------------------


def test_third_document_streams_and_names_the_session(server):
    """POST /api/chat/stream with conversation_id creates the session and says its id in a header."""
    first = server.stream("/api/chat/stream", {"message": "你好，我叫张三", "conversation_id": "user_001"})
    assert first.status == 200
    assert first.headers["x-session-id"] == "user_001"
    assert first.headers["content-type"].startswith("text/event-stream")
    assert "张三" in list(first)[-1]["reply"]
    second = server.stream("/api/chat/stream", {"message": "我叫什么名字？", "conversation_id": "user_001"})
    assert "张三" in list(second)[-1]["reply"]


def test_third_document_chats_without_a_stream(server):
    """POST /api/chat answers JSON for its own session."""
    answer = server.request("POST", "/api/chat", {"message": "你好", "conversation_id": "user_002"})
    assert answer.status == 200
    assert answer.body["session_id"] == "user_002"


def test_third_document_keeps_sessions_apart_word_for_word(server):
    """Session 1 is told a name and knows it; session 2 was not and says so."""

    def chat(message, conversation_id):
        body = {"message": message, "conversation_id": conversation_id}
        return server.request("POST", "/api/chat", body).body["reply"]

    chat("我叫张三", "test_1")
    assert "你叫张三" in chat("我叫什么？", "test_1")
    reply = chat("我叫什么？", "test_2")
    assert "我不知道你的名字" in reply
    assert "张三" not in reply


def test_third_document_serves_two_english_users(server):
    """Alice's and Bob's sessions each know their own name."""

    def chat(message, session_id):
        body = {"message": message, "conversation_id": session_id}
        return server.request("POST", "/api/chat", body).body["reply"]

    chat("你好，我叫 Alice", "user_alice")
    chat("你好，我叫 Bob", "user_bob")
    assert "Alice" in chat("我叫什么名字？", "user_alice")
    assert "Bob" in chat("我叫什么名字？", "user_bob")


def test_third_document_lists_shows_and_deletes_sessions(server):
    """GET /api/sessions, GET and DELETE of one, with the documented fields."""
    for _ in range(2):
        server.request("POST", "/api/chat", {"message": "你好", "conversation_id": "listed_001"})
    listed = server.request("GET", "/api/sessions")
    assert listed.status == 200
    assert listed.body["total"] == len(listed.body["sessions"])
    assert "listed_001" in [session["session_id"] for session in listed.body["sessions"]]
    shown = server.request("GET", "/api/sessions/listed_001")
    assert shown.status == 200
    assert (shown.body["session_id"], shown.body["message_count"]) == ("listed_001", 4)
    assert TIME.match(shown.body["created_at"])
    assert TIME.match(shown.body["last_accessed"])
    deleted = server.request("DELETE", "/api/sessions/listed_001")
    assert deleted.status == 200
    assert deleted.body["session_id"] == "listed_001"
    assert deleted.body["message"]
    assert server.request("GET", "/api/sessions/listed_001").status == 404


def test_third_document_asks_for_health(server):
    """GET /health counts the sessions."""
    answer = server.request("GET", "/health")
    assert answer.status == 200
    assert answer.body["status"] == "healthy"
    assert answer.body["agent_initialized"] is True
    total = server.request("GET", "/sessions").body["total"]
    assert answer.body["session_count"] == total


# -- fourth document: the agents of a backend --------------------------------------------------


@pytest.fixture
def live_session(server):
    server.request("POST", "/agent_backend/chat", {"session_id": "user1_session", "message": "你好"})
    return "user1_session"


def test_fourth_document_chats(server, live_session):
    """POST /agent_backend/chat as the front end sends it; without a content type it is refused."""
    answer = server.request("POST", "/agent_backend/chat", {"session_id": live_session, "message": "你好"})
    assert answer.status == 200
    untyped = server.request("POST", "/agent_backend/chat", b'{"session_id": "x", "message": "hi"}')
    assert (untyped.status, untyped.body["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


def test_fourth_document_counts_agents(server, live_session):
    """GET /agent_backend/agent-stats has the documented numbers, and they add up."""
    stats = server.request("GET", "/agent_backend/agent-stats")
    assert stats.status == 200
    body = stats.body
    assert (body["max_agents"], body["agent_ttl"]) == (100, 3600)
    assert body["total_agents"] == body["active_agents"] + body["idle_agents"]
    assert body["idle_agents"] >= 1


def test_fourth_document_lists_and_removes_a_live_agent(server, live_session):
    """GET /agent_backend/agent-sessions shows it; DELETE drops the agent and keeps the session."""
    listed = server.request("GET", "/agent_backend/agent-sessions")
    assert listed.status == 200
    names = [key for key, value in listed.body.items() if isinstance(value, list)]
    assert live_session in [live["session_id"] for live in listed.body[names[0]]]
    assert server.request("DELETE", f"/agent_backend/agent-sessions/{live_session}").status == 200
    assert server.request("DELETE", f"/agent_backend/agent-sessions/{live_session}").status == 404
    assert server.request("GET", f"/sessions/{live_session}").body["live"] is False
    again = server.request("POST", "/agent_backend/chat", {"session_id": live_session, "message": "你好"})
    assert again.body["activation"] == "restored"


def test_fourth_document_asks_for_health_and_cleans_up(server, live_session):
    """GET /agent_backend/agent-health is healthy; POST /agent_backend/agent-cleanup needs no body."""
    health = server.request("GET", "/agent_backend/agent-health")
    assert health.status == 200
    assert health.body["status"] == "healthy"
    assert set(health.body["checks"]) == {"pool", "store", "model", "event_loop"}
    cleanup = server.request("POST", "/agent_backend/agent-cleanup")
    assert cleanup.status == 200
    assert cleanup.body["mode"] == "expired"
    assert cleanup.body["removed"] == 0
    assert cleanup.body["remaining"] >= 1


def test_fourth_document_isolates_concurrent_users(server):
    """Ten users at once, two turns each: each is told its own name only."""
    import concurrent.futures

    def visit(number):
        session_id = f"concurrent_{number}"
        server.request("POST", "/chat", {"session_id": session_id, "message": f"My name is Guest{number:02}"})
        return server.request("POST", "/chat", {"session_id": session_id, "message": "What is my name?"}).body

    with concurrent.futures.ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(visit, range(10)))
    for number, answer in enumerate(answers):
        assert re.findall(r"Guest\d\d", answer["reply"]) == [f"Guest{number:02}"]
        assert answer["turn_count"] == 2
