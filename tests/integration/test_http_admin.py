"""The operator's routes over HTTP."""

from collections.abc import Iterator

import httpx2
import pytest

from tests.integration.test_http_server import HttpServer, problem


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with HttpServer(agent_max_instances=10) as server:
        yield server.client


def chat(client: httpx2.Client, *sessions: str) -> None:
    for session_id in sessions:
        assert client.post("/chat", json={"session_id": session_id, "message": "hi"}).status_code == 200


def test_stats(client: httpx2.Client) -> None:
    """Every counter of the contract, and that they add up."""
    chat(client, "a", "b", "a")
    stats = client.get("/agent-stats").json()
    assert set(stats) == {
        "total_agents",
        "active_agents",
        "idle_agents",
        "activating_agents",
        "zombie_agents",
        "max_agents",
        "agent_ttl",
        "waiting",
        "utilization",
        "hits",
        "misses",
        "restores",
        "hit_ratio",
        "evictions",
        "discards",
        "rejections",
        "memory",
        "uptime_s",
        "draining",
    }
    parts = ("active_agents", "idle_agents", "activating_agents", "zombie_agents")
    assert stats["total_agents"] == sum(stats[part] for part in parts) == 2
    assert (stats["hits"], stats["misses"], stats["utilization"]) == (1, 2, 0.2)
    assert set(stats["evictions"]) == {"ttl", "lru", "memory", "admin", "drain"}
    assert set(stats["discards"]) == {"error", "cancel", "conflict", "deadline"}
    assert set(stats["memory"]) == {"estimated_bytes", "rss_bytes", "limit_bytes"}
    assert stats["draining"] is False


def test_live_agents_are_listed(client: httpx2.Client) -> None:
    """One entry per live agent, by page and order."""
    chat(client, "a", "b", "c")
    page = client.get("/agent-sessions?limit=2&by=recent").json()
    assert page["total"] == 3
    assert [one["session_id"] for one in page["sessions"]] == ["c", "b"]
    rest = client.get(f"/agent-sessions?limit=2&by=recent&cursor={page['next_cursor']}").json()
    assert [one["session_id"] for one in rest["sessions"]] == ["a"]
    assert set(page["sessions"][0]) == {
        "session_id",
        "user_id",
        "agent_id",
        "status",
        "idle_s",
        "age_s",
        "turns",
        "estimated_bytes",
        "provider",
        "model",
    }
    assert [one["session_id"] for one in client.get("/agent-sessions?by=idle").json()["sessions"]] == [
        "a",
        "b",
        "c",
    ]
    problem(client.get("/agent-sessions?by=size"), 422, "VALIDATION_ERROR")
    problem(client.get("/agent-sessions?cursor=x!"), 422, "VALIDATION_ERROR")


def test_an_evicted_agent_is_restored(client: httpx2.Client) -> None:
    """The session stays, and the next turn does not notice but for ``activation``."""
    chat(client, "a")
    assert client.delete("/agent-sessions/a").json()["session_id"] == "a"
    assert client.get("/sessions/a").json()["live"] is False
    problem(client.delete("/agent-sessions/a"), 404, "AGENT_NOT_FOUND")
    answer = client.post("/chat", json={"session_id": "a", "message": "hi"}).json()
    assert (answer["activation"], answer["turn_count"]) == ("restored", 2)
    problem(client.delete("/agent-sessions/a?force=1"), 422, "VALIDATION_ERROR")
    assert client.delete("/agent-sessions/a?force=true").status_code == 200


def test_cleanup(client: httpx2.Client) -> None:
    """A dry run tells, a real one does, and without a body only what is due goes."""
    chat(client, "a", "b", "c")
    nothing = client.post("/agent-cleanup").json()
    assert (nothing["mode"], nothing["removed"], nothing["remaining"]) == ("expired", 0, 3)
    body = {"mode": "oldest", "count": 2, "dry_run": True}
    assert client.post("/agent-cleanup", json=body).json()["removed"] == 2
    assert client.get("/agent-stats").json()["total_agents"] == 3
    done = client.post("/agent-cleanup", json={**body, "dry_run": False}).json()
    assert set(done) == {
        "mode",
        "examined",
        "removed",
        "skipped_busy",
        "remaining",
        "sessions_expired",
        "sessions_purged",
        "duration_ms",
    }
    assert [one["session_id"] for one in client.get("/agent-sessions").json()["sessions"]] == ["c"]
    assert client.post("/agent-cleanup", json={"mode": "idle", "idle_s": 0}).json()["remaining"] == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"mode": "all"}, "mode"),
        ({"mode": "idle"}, "idle_s"),
        ({"mode": "oldest"}, "count"),
        ({"mode": "oldest", "count": 0}, "count"),
        ({"mode": "oldest", "count": True}, "count"),
        ({"mode": "idle", "idle_s": -1}, "idle_s"),
        ({"dry_run": 1}, "dry_run"),
        ({"nope": 1}, "nope"),
    ],
)
def test_unfit_cleanups(client: httpx2.Client, body: dict, field: str) -> None:
    """Refused at the field that does not fit, or is missing."""
    errors = problem(client.post("/agent-cleanup", json=body), 422, "VALIDATION_ERROR")["errors"]
    assert [error["field"] for error in errors] == [field]


def test_health_of_the_parts(client: httpx2.Client) -> None:
    """Four checks and the worst of them."""
    health = client.get("/agent-health").json()
    assert health["status"] == "healthy"
    assert set(health["checks"]) == {"pool", "store", "model", "event_loop"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/redoc"])
def test_probes_may_ask_for_heads(client: httpx2.Client, path: str) -> None:
    """HEAD is answered as GET, without the body."""
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(got.content))
