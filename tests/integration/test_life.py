"""A session's life over HTTP: refreshed, resumed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.integration.test_http_server import HttpServer, problem
from tests.integration.test_http_sessions import FIELDS


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with HttpServer() as server:
        yield server.client


def test_a_refresh_is_activity_but_no_revision(client: httpx2.Client) -> None:
    """The clock starts again and the idle mark goes; the ETag stays."""
    client.post("/sessions", json={"session_id": "s", "ttl_s": 1000})
    before = client.patch("/sessions/s", json={"status": "idle"})
    response = client.post("/sessions/s/refresh")
    after = response.json()
    assert response.status_code == 200
    assert list(after) == FIELDS
    assert (before.json()["status"], after["status"]) == ("idle", "active")
    assert response.headers["etag"] == before.headers["etag"] == '"0.2"'
    assert after["expires_at"] >= before.json()["expires_at"]
    assert after["updated_at"] == before.json()["updated_at"]
    assert client.get("/sessions/s").json() == after


def test_an_archived_session_stays_archived(client: httpx2.Client) -> None:
    """A refresh gives it no expiry."""
    client.post("/sessions", json={"session_id": "s"})
    client.patch("/sessions/s", json={"status": "archived"})
    refreshed = client.post("/sessions/s/refresh").json()
    assert (refreshed["status"], refreshed["expires_at"]) == ("archived", None)


def test_only_what_is_there_is_refreshed(client: httpx2.Client) -> None:
    """A missing session and another user's are both 404."""
    problem(client.post("/sessions/s/refresh"), 404, "SESSION_NOT_FOUND")
    client.post("/sessions", json={"session_id": "s", "user_id": "alice"})
    problem(client.post("/sessions/s/refresh?user_id=bob"), 404, "SESSION_NOT_FOUND")
    assert client.post("/api/sessions/s/refresh?user_id=alice").status_code == 200


def resume(client: httpx2.Client, **body: str) -> tuple[int, str]:
    response = client.post("/sessions/resume", json=body)
    return response.status_code, response.json()["session_id"]


def test_resume_finds_the_newest_that_fits(client: httpx2.Client) -> None:
    """Of the user's active sessions the one active last, of the window if one is named."""
    for name, window in (("a", "desktop"), ("b", "phone"), ("c", "desktop")):
        client.post("/sessions", json={"session_id": name, "user_id": "alice", "window_id": window})
    assert resume(client, user_id="alice") == (200, "c")
    client.post("/chat", json={"session_id": "a", "message": "hi"})
    assert resume(client, user_id="alice") == (200, "a")
    assert resume(client, user_id="alice", window_id="phone", agent_id="assistant") == (200, "b")
    client.patch("/sessions/b", json={"status": "archived"})
    status, made = resume(client, user_id="alice", window_id="phone")
    assert status == 201
    assert made not in "abc"


def test_resume_makes_one(client: httpx2.Client) -> None:
    """Without a session that fits: 201, with its path, and the next call finds it."""
    body = {"user_id": "alice", "window_id": "w", "agent_id": "assistant"}
    response = client.post("/api/sessions/resume", json=body)
    made = response.json()
    assert response.status_code == 201
    assert list(made) == FIELDS
    assert {name: made[name] for name in body} == body
    assert response.headers["location"] == f"/api/sessions/{made['session_id']}"
    assert response.headers["etag"] == '"0.1"'
    again = client.post("/sessions/resume", json=body)
    assert (again.status_code, again.json(), "location" in again.headers) == (200, made, False)


def test_resuming_at_once_makes_one_session(client: httpx2.Client) -> None:
    """Of twenty calls one makes the session and all get it."""
    with ThreadPoolExecutor(20) as people:
        answers = list(people.map(lambda _: resume(client, user_id="alice"), range(20)))
    assert len({session_id for _, session_id in answers}) == 1
    assert sorted(status for status, _ in answers) == [200] * 19 + [201]


def test_resume_refuses_what_does_not_fit(client: httpx2.Client) -> None:
    """A user is needed, the agent must be known, and no other field is."""
    problem(client.post("/sessions/resume", json={}), 422, "VALIDATION_ERROR")
    problem(client.post("/sessions/resume", json={"user_id": "u", "title": "t"}), 422, "VALIDATION_ERROR")
    problem(client.post("/sessions/resume", json={"user_id": "u", "agent_id": "x"}), 404, "AGENT_NOT_FOUND")
