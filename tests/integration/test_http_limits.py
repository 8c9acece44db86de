"""Limits of users over HTTP: what is refused, what the headers say, and that nothing is kept of it."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.faultproxy import BLACK_HOLE, FaultProxy
from tests.integration.test_http_server import HttpServer, problem
from tests.integration.test_policies import settings_for
from tests.modelserver import ModelServer
from tests.people import bearer, make_keys
from tests.redisserver import RedisServer

SLOW = {"mode": "text", "text": "well", "first_s": 30}
NAMES = ("limit", "remaining", "reset", "policy")


def told(response: httpx2.Response) -> dict[str, str]:
    """Return the limits that the response tells of; each header is there once."""
    names = [name for name, _ in response.headers.multi_items() if name.startswith("ratelimit-")]
    assert len(names) == len(set(names))
    return {name: response.headers[f"ratelimit-{name}"] for name in NAMES if f"ratelimit-{name}" in names}


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture(params=["memory", "redis"])
def counter_url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    url: str = request.getfixturevalue("redis_server").url
    return url


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    path, keys = make_keys(tmp_path)
    return {"api_keys_file": path, "keys": keys}


def limited(keys: dict[str, Any], **settings: Any) -> HttpServer:
    return HttpServer(auth_mode="api_key", api_keys_file=keys["api_keys_file"], **settings)


def test_requests_per_minute(counter_url: str, keys: dict[str, Any]) -> None:
    """Exactly so many for each user, bodies unread beyond; admins, probes and wrong keys do not count."""
    alice, bobby, chief = (bearer(keys["keys"][name]) for name in ("alice", "bobby", "chief"))
    with limited(keys, user_requests_per_minute=5, rate_limit_url=counter_url) as server:
        client = server.client
        for left in (4, 3, 2, 1, 0):
            limits = told(client.get("/sessions", headers=alice))
            assert (limits["limit"], limits["remaining"]) == ("5", str(left))
            assert limits["policy"] == '5;w=60;comment="requests"'
            assert 0 <= int(limits["reset"]) <= 60
        refused = client.post("/chat", headers=alice, content=b"not read", timeout=5)
        problem(refused, 429, "RATE_LIMITED")
        assert told(refused)["remaining"] == "0"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert told(client.get("/api/sessions", headers=bobby))["remaining"] == "4"
        for _ in range(12):
            assert told(client.get("/agent-stats", headers=chief)) == {}
            assert told(client.get("/health")) == {}
        problem(client.get("/sessions", headers=bearer("wrong")), 401, "UNAUTHENTICATED")
        problem(client.get("/sessions", headers=alice), 429, "RATE_LIMITED")


def test_nodes_count_together(redis_server: RedisServer, keys: dict[str, Any]) -> None:
    """Two processes with one Redis: what one has counted, the other knows."""
    bobby = bearer(keys["keys"]["bobby"])
    settings = {"user_requests_per_minute": 1000, "rate_limit_url": redis_server.url + "/1"}
    with limited(keys, **settings) as one, limited(keys, **settings) as two:
        left = [
            int(told(each.client.get("/sessions", headers=bobby))["remaining"]) for each in (one, two, one)
        ]
        assert left == [999, 998, 997]


def test_a_counter_that_is_silent_refuses_as_few(redis_server: RedisServer, keys: dict[str, Any]) -> None:
    """A Redis that takes and never answers: this process counts, so one user's flood is limited as before."""
    with FaultProxy(redis_server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/2"
        with limited(keys, user_requests_per_minute=3, rate_limit_url=url) as server:
            client = server.client
            headers = bearer(keys["keys"]["alice"])
            assert told(client.get("/sessions", headers=headers))["remaining"] == "2"
            proxy.inflict(BLACK_HOLE)
            answers = [client.get("/sessions", headers=headers) for _ in range(5)]
            assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 2
            assert [told(answer)["remaining"] for answer in answers] == ["2", "1", "0", "0", "0"]
            bobby = bearer(keys["keys"]["bobby"])
            assert told(client.get("/sessions", headers=bobby))["remaining"] == "2"
            assert client.get("/ready").status_code == 200


def test_turns_at_a_time_are_exact() -> None:
    """Of 50 at once of one user exactly three run; another user's do; each that ends makes room."""
    with (
        ModelServer() as model,
        HttpServer(**settings_for(model, user_concurrent_turns=3)) as server,
    ):
        model.script({**SLOW, "repeat": 60})

        async def ask() -> None:
            async with httpx2.AsyncClient(base_url=server.url, timeout=20) as client:

                async def begin(number: int, user: str = "alice") -> httpx2.Response:
                    body = {"session_id": f"{user}-{number}", "user_id": user, "message": "hi"}
                    request = client.build_request("POST", "/chat/stream", json=body)
                    return await client.send(request, stream=True)

                begun = await asyncio.gather(*(begin(number) for number in range(50)))
                running = [answer for answer in begun if answer.status_code == 200]
                assert len(running) == 3
                for answer in begun:
                    await answer.aread() if answer.status_code != 200 else None
                refused = [answer for answer in begun if answer.status_code == 429]
                assert len(refused) == 47
                problem(refused[0], 429, "RATE_LIMITED")
                assert told(refused[0]) == {
                    "limit": "3",
                    "remaining": "0",
                    "reset": "1",
                    "policy": '3;comment="turns"',
                }
                assert {told(answer)["remaining"] for answer in running} == {"0", "1", "2"}
                listed = (await client.get("/sessions?user_id=alice")).json()
                assert listed["total"] >= 3
                other = await begin(1, "bobby")
                assert told(other)["remaining"] == "2"
                session = running[0].headers["x-session-id"]
                assert (await client.post(f"/sessions/{session}/cancel", json={})).status_code == 202
                async for _ in running[0].aiter_raw():
                    pass
                again = await begin(99)
                assert again.status_code == 200
                for answer in (*running, other, again):
                    session = answer.headers["x-session-id"]
                    await client.post(
                        f"/sessions/{session}/cancel", json={"all": True, "keep_partial": False}
                    )
                    await answer.aclose()

        asyncio.run(ask())


def test_a_refused_turn_leaves_nothing() -> None:
    """Neither a session nor a key: the same request succeeds once there is room."""
    with (
        ModelServer() as model,
        HttpServer(**settings_for(model, user_concurrent_turns=1)) as server,
    ):
        model.script(SLOW)
        client = server.client
        first = {"session_id": "one", "user_id": "alice", "message": "hi"}
        second = {"session_id": "two", "user_id": "alice", "message": "hi"}
        key = {"Idempotency-Key": "k1"}
        with client.stream("POST", "/chat/stream", json=first) as running:
            assert running.status_code == 200
            problem(client.post("/chat", json=second, headers=key), 429, "RATE_LIMITED")
            problem(client.get("/sessions/two"), 404, "SESSION_NOT_FOUND")
            problem(client.post("/sessions/one/regenerate", json={}), 429, "RATE_LIMITED")
            problem(client.post("/sessions/one/compact", json={}), 429, "RATE_LIMITED")
            client.post("/sessions/one/cancel", json={"keep_partial": False})
            running.read()
        answer = client.post("/chat", json=second, headers=key)
        assert (answer.status_code, answer.json()["turn_count"]) == (200, 1)
        repeated = client.post("/chat", json=second, headers=key)
        assert repeated.json()["turn_id"] == answer.json()["turn_id"]


def test_tokens_per_day(tmp_path: Path) -> None:
    """A turn that begins below the limit ends; then none begins, also after a restart, until midnight UTC."""
    settings = {"store_url": f"sqlite:///{tmp_path}/pool.db", "user_tokens_per_day": 40}
    body = {"session_id": "s", "user_id": "alice", "message": "one two three four five six"}
    used = 0
    with HttpServer(**settings) as server:
        while used < 40:
            answer = server.client.post("/chat", json=body)
            limits = told(answer)
            assert (limits["limit"], limits["remaining"]) == ("40", str(40 - used))
            assert limits["policy"] == '40;w=86400;comment="tokens"'
            used += answer.json()["usage"]["total_tokens"]
        refused = server.client.post("/chat/stream", json=body)
        problem(refused, 429, "RATE_LIMITED")
        assert told(refused)["remaining"] == "0"
        assert re.fullmatch(r"\d{1,5}", told(refused)["reset"])
        assert (
            server.client.post("/chat", json={**body, "session_id": "t", "user_id": "bob"}).status_code == 200
        )
        assert told(server.client.get("/sessions/s")) == {}
    with HttpServer(**settings) as server:
        problem(server.client.post("/chat", json=body), 429, "RATE_LIMITED")
        assert (
            server.client.get("/users/alice/usage").json()["turns"]
            == server.client.get("/sessions/s").json()["turn_count"]
        )


@pytest.mark.parametrize("keep_partial", [False, True])
def test_who_leaves_before_the_end_has_spent_tokens(keep_partial: bool) -> None:
    """A cancelled turn costs about its prompt and its words; stored is only what the provider counted."""
    settings = {"model_provider": "openai", "openai_api_key": "k", "user_tokens_per_day": 300}
    body = {"session_id": "s", "user_id": "alice", "message": "hi " * 400}
    with ModelServer() as model, HttpServer(openai_base_url=model.base_url, **settings) as server:
        model.script({"mode": "stall_mid", "text": "well"})
        with server.client.stream("POST", "/chat/stream", json=body) as running:
            events = running.iter_lines()
            assert any('"text":"well"' in line for line in events)
            server.client.post("/sessions/s/cancel", json={"keep_partial": keep_partial})
            assert "event: turn.cancelled" in list(events)
        problem(server.client.post("/chat", json=body), 429, "RATE_LIMITED")
        assert server.client.get("/users/alice/usage").json()["completion_tokens"] == 0


def test_a_model_that_does_not_answer_costs_nothing() -> None:
    """A turn that fails before the model has said anything."""
    settings = {"model_provider": "openai", "openai_api_key": "k", "user_tokens_per_day": 300}
    body = {"session_id": "s", "user_id": "alice", "message": "hi " * 400}
    with ModelServer() as model, HttpServer(openai_base_url=model.base_url, **settings) as server:
        model.script({"mode": "status", "status": 400})
        failed = server.client.post("/chat", json=body)
        assert failed.status_code == 502
        assert told(server.client.post("/chat", json=body))["remaining"] == "300"


def test_an_erasure_does_not_begin_the_day_anew() -> None:
    """Who has used up the day's tokens and has themselves erased has used them up."""
    body = {"session_id": "s", "user_id": "alice", "message": "one two three four five six"}
    with HttpServer(user_tokens_per_day=5) as server:
        assert server.client.post("/chat", json=body).status_code == 200
        problem(server.client.post("/chat", json=body), 429, "RATE_LIMITED")
        assert server.client.delete("/users/alice").json()["erased"]["sessions"] == 1
        problem(server.client.post("/chat", json=body), 429, "RATE_LIMITED")
