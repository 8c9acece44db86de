"""The audit log over HTTP: what is in it, what is not, and what happens when it cannot be written."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.integration.test_http_server import HttpServer, problem
from tests.people import bearer, make_keys

Json = dict[str, Any]
CANARY = "canary-7c1f"


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return make_keys(tmp_path)[1]


@pytest.fixture
def client(tmp_path: Path, audit: Path, keys: dict[str, str]) -> Iterator[httpx2.Client]:
    path = str(tmp_path / "keys.json")
    with HttpServer(auth_mode="api_key", api_keys_file=path, audit_file=str(audit)) as server:
        yield server.client


def lines_of(audit: Path) -> list[Json]:
    return [json.loads(line) for line in audit.read_text().splitlines()]


def test_an_admins_changes_are_in_it(client: httpx2.Client, audit: Path, keys: dict[str, str]) -> None:
    """Who, what, of whom, when, with which result and request: one line each, before the answer is read."""
    chief = bearer(keys["chief"]) | {"X-Request-ID": "r-1"}
    body = {"session_id": "s", "user_id": "alice", "message": CANARY, "metadata": {"a": CANARY}}
    client.post("/chat", json=body, headers=chief)
    expected = {
        "credential": f"key:{keys['chief'][3:19]}",
        "user_id": "chief",
        "action": "POST /chat",
        "path": "/chat",
        "owner": "alice",
        "session_id": "s",
        "status": 200,
        "code": None,
        "request_id": "r-1",
        "receipt_id": None,
        "sessions": [],
        "choices": {},
    }
    assert [{k: v for k, v in line.items() if k != "at"} for line in lines_of(audit)] == [expected]
    client.patch("/sessions/s?user_id=alice", json={"title": CANARY}, headers=chief)
    client.delete("/agent-sessions/s?user_id=alice", headers=chief)
    client.delete("/agent-sessions/s?user_id=alice", headers=chief)
    client.post("/api/agent-cleanup", json={"mode": "idle"}, headers=chief)
    client.patch("/apps/default/state", json={"state": {"a": CANARY}}, headers=chief)
    client.delete("/agents/none/sessions", headers=chief)
    client.delete("/users/alice/sessions", headers=chief)
    made = client.post("/sessions", json={"user_id": "alice"}, headers=chief).json()["session_id"]
    assert lines_of(audit)[-1]["session_id"] == made
    told = [
        (line["action"], line["path"], line["owner"], line["status"], line["code"])
        for line in lines_of(audit)
    ]
    assert told[1:] == [
        ("PATCH /sessions/{session_id}", "/sessions/s", "alice", 200, None),
        ("DELETE /agent-sessions/{session_id}", "/agent-sessions/s", "alice", 200, None),
        ("DELETE /agent-sessions/{session_id}", "/agent-sessions/s", "alice", 404, "AGENT_NOT_FOUND"),
        ("POST /agent-cleanup", "/api/agent-cleanup", None, 422, "VALIDATION_ERROR"),
        ("PATCH /apps/{app_name}/state", "/apps/default/state", None, 200, None),
        ("DELETE /agents/{agent_id}/sessions", "/agents/none/sessions", None, 200, None),
        ("DELETE /users/{user_id}/sessions", "/users/alice/sessions", "alice", 200, None),
        ("POST /sessions", "/sessions", "alice", 201, None),
    ]
    assert CANARY not in audit.read_text()
    assert not any(key in audit.read_text() for key in keys.values())
    assert audit.stat().st_mode & 0o777 == 0o600


def test_a_batch_names_all_that_it_was_about(
    client: httpx2.Client, audit: Path, keys: dict[str, str]
) -> None:
    """Each session that was made, and whose it is; each that was to be deleted; the user, if it is one."""
    chief = bearer(keys["chief"])
    entries = [
        {"user_id": "alice", "session_id": "x1"},
        {"user_id": "bobby"},
        {"session_id": "x3"},
        {"user_id": "carol", "session_id": "/"},
    ]
    made = client.post("/sessions/batch", json={"sessions": entries}, headers=chief).json()["results"]
    client.post("/sessions/batch", json={"sessions": entries[:1]}, headers=chief)
    client.post(
        "/sessions/batch-delete?user_id=alice", json={"session_ids": ["x1", "none", "x1"]}, headers=chief
    )
    first, again, gone = lines_of(audit)
    assert first["sessions"] == [["alice", "x1"], ["bobby", made[1]["session_id"]], ["chief", "x3"]]
    assert (first["owner"], first["session_id"]) == (None, None)
    assert (again["owner"], again["sessions"]) == ("alice", [])
    assert (gone["owner"], gone["sessions"]) == ("alice", [["alice", "none"], ["alice", "x1"]])


def test_how_an_operator_wanted_it_done_is_in_it(
    client: httpx2.Client, audit: Path, keys: dict[str, str]
) -> None:
    """As far as it was understood: a parameter that there is not may be anybody's secret."""
    chief = bearer(keys["chief"])
    node = client.get("/agent-nodes", headers=chief).json()["nodes"][0]["node"]
    client.post(f"/agent-cleanup?node={node}", json={"mode": "oldest", "count": 5}, headers=chief)
    client.post(f"/agent-cleanup?{CANARY}=1", json={"mode": "idle"}, headers=chief)
    client.delete("/agent-sessions/s?force=true&user_id=alice", headers=chief)
    assert [(line["status"], line["choices"]) for line in lines_of(audit)] == [
        (200, {"node": node, "mode": "oldest", "count": 5}),
        (422, {}),
        (404, {"force": True}),
    ]
    assert CANARY not in audit.read_text()


def test_what_is_no_admins_change_is_not_in_it(
    client: httpx2.Client, audit: Path, keys: dict[str, str]
) -> None:
    """Users' changes, an admin's of their own, reading, and what was refused for want of the scope."""
    for who in ("alice", "chief"):
        mine = bearer(keys[who])
        client.post("/chat", json={"session_id": "s", "message": "hi"}, headers=mine)
        client.patch("/sessions/s", json={"title": "t"}, headers=mine)
        client.delete("/sessions/s", headers=mine)
    chief = bearer(keys["chief"])
    for path in (
        "/agent-stats",
        "/sessions?user_id=alice",
        "/sessions/s?user_id=alice",
        "/users/alice/usage",
    ):
        client.get(path, headers=chief)
    problem(client.post("/agent-cleanup", headers=bearer(keys["alice"])), 403, "FORBIDDEN")
    problem(client.delete("/users/chief/sessions", headers=bearer(keys["alice"])), 403, "FORBIDDEN")
    problem(client.post("/agent-cleanup"), 401, "UNAUTHENTICATED")
    assert lines_of(audit) == []


def test_what_cannot_be_noted_is_not_done(client: httpx2.Client, audit: Path, keys: dict[str, str]) -> None:
    """With the log out of reach an admin's change is refused; users go on, and so does reading."""
    mine, chief = bearer(keys["alice"]), bearer(keys["chief"])
    client.post("/chat", json={"session_id": "s", "message": "hi"}, headers=mine)
    audit.unlink()
    audit.mkdir()
    refused = client.delete("/users/alice/sessions", headers=chief)
    assert "/" not in problem(refused, 503, "STORE_UNAVAILABLE")["detail"]
    assert client.get("/sessions/s?user_id=alice", headers=chief).status_code == 200
    assert client.post("/chat", json={"session_id": "s", "message": "hi"}, headers=mine).status_code == 200
    os.rmdir(audit)
    assert client.delete("/users/alice/sessions", headers=chief).json() == {"deleted": 1}
    assert [line["action"] for line in lines_of(audit)] == ["DELETE /users/{user_id}/sessions"]


def test_without_a_file_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    """At INFO from ``agentpool.audit`` whatever the level of all else, also where nobody is asked."""
    assert logging.getLogger().level > logging.INFO
    with HttpServer() as server:
        server.client.post("/agent-cleanup")
        server.client.post("/chat", json={"session_id": "s", "user_id": "alice", "message": "hi"})
    (record,) = [record for record in caplog.records if record.name == "agentpool.audit"]
    assert record.levelno == logging.INFO
    line = json.loads(record.getMessage())
    assert (line["credential"], line["user_id"], line["action"]) == ("none", None, "POST /agent-cleanup")
