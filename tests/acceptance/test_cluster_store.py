"""A store that is frozen, gone, or comes back with less: told at once, over in a moment, nothing broken."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, says, until
from tests.modelserver import ModelServer
from tests.serverprocess import Reply, ServerProcess
from tests.storeserver import StoreServer, bring_back, take_copy

REFUSED_S = 1.5
BACK_S = 3.0
HEALTH_S = 0.5
"""Milliseconds alone; beside other tests the machine's own hiccups."""


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as model:
        yield model


@pytest.fixture(scope="module")
def cluster(
    store_server: StoreServer, model: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two nodes that the tests of this module share; each test has sessions of its own."""
    with Cluster(tmp_path_factory.mktemp("cluster"), [store_server.url] * 2, model) as cluster:
        yield cluster


def say(node: ServerProcess, session_id: str, text: str, **headers: str) -> Reply:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return node.request("POST", "/chat", {"session_id": session_id, "message": says(text)}, sent)


def timed(node: ServerProcess, method: str, path: str, body: Any = None) -> tuple[Reply, float]:
    began = time.monotonic()
    reply = node.request(method, path, body)
    return reply, time.monotonic() - began


# Each concerns a session of its own, ``{}``: those of one session would stand in line.
REQUESTS = [
    ("POST", "/chat", {"session_id": "{}", "message": says("x")}),
    ("POST", "/chat", {"session_id": "{}-new", "message": says("x")}),
    ("POST", "/chat/stream", {"session_id": "{}", "message": says("x")}),
    ("GET", "/sessions", None),
    ("GET", "/sessions/{}", None),
    ("GET", "/sessions/{}/history", None),
    ("GET", "/sessions/{}/turns", None),
    ("GET", "/sessions/{}/turns/active", None),
    ("PATCH", "/sessions/{}", {"title": "t"}),
    ("PATCH", "/sessions/{}/state", {"state": {"a": 1}}),
    ("POST", "/sessions/{}/rewind", {"turns": 1}),
    ("POST", "/sessions/{}/cancel", {}),
    ("DELETE", "/sessions/{}", None),
    ("GET", "/sessions/stats", None),
    ("GET", "/ready", None),
]


def requests_of(prefix: str) -> list[tuple[str, str, Any]]:
    """Return the requests, each with a session of its own."""
    named = []
    for number, (method, path, body) in enumerate(REQUESTS):
        session_id = f"{prefix}-{number}"
        if body is not None and "session_id" in body:
            body = body | {"session_id": body["session_id"].format(session_id)}
        named.append((method, path.format(session_id), body))
    return named


@pytest.mark.parametrize("trouble", ["frozen", "killed"])
def test_a_store_that_does_not_answer(store_server: StoreServer, cluster: Cluster, trouble: str) -> None:
    """What needs it is refused in 1.5 s, /health is fast; 3 s after its return all goes on, with all."""
    until_ready(cluster)
    sessions = [f"{trouble}-{node}-{number}" for node in range(2) for number in range(len(REQUESTS))]
    for number, name in enumerate([*sessions, *([trouble] * 6)]):
        assert say(cluster.nodes[number % 2], name, f"turn {number}").status == 200
    befall(store_server, trouble)
    try:
        for number, node in enumerate(cluster.nodes):
            check_refusals(node, requests_of(f"{trouble}-{number}"))
    finally:
        relieve(store_server, trouble)
    began = time.monotonic()
    for node in cluster.nodes:
        until(lambda: node.request("GET", "/ready").status == 200, BACK_S)  # noqa: B023
        until(lambda: say(node, "other", "back").status == 200, BACK_S)  # noqa: B023
    assert time.monotonic() - began < BACK_S
    count = len(sessions)
    shown = [m["content"] for m in cluster.history(trouble)][1::2]
    assert shown == [f"turn {number}" for number in range(count, count + 6)]
    assert "Traceback" not in cluster.logs()


def befall(server: StoreServer, trouble: str) -> None:
    server.freeze() if trouble == "frozen" else server.kill()


def relieve(server: StoreServer, trouble: str) -> None:
    server.thaw() if trouble == "frozen" else server.start()


def check_refusals(node: ServerProcess, requests: list[tuple[str, str, Any]]) -> None:
    with ThreadPoolExecutor(len(requests)) as threads:
        asked = [threads.submit(timed, node, *request) for request in requests]
        health = [timed(node, "GET", "/health") for _ in range(10)]
    assert {reply.status for reply, _ in health} == {200}
    assert max(seconds for _, seconds in health) < HEALTH_S
    for request, done in zip(requests, asked, strict=True):
        reply, seconds = done.result()
        assert (request, reply.status, reply.body["code"]) == (request, 503, "STORE_UNAVAILABLE")
        assert seconds < REFUSED_S, request


@pytest.mark.parametrize("trouble", ["frozen", "killed"])
def test_a_turn_that_runs_meanwhile_is_committed(
    store_server: StoreServer, cluster: Cluster, trouble: str
) -> None:
    """A turn whose model goes on through it all is committed afterwards, or said to have failed."""
    node, calm, known = cluster.nodes[0], f"{trouble}-calm", f"{trouble}-known"
    until_ready(cluster)
    for name in (calm, known):
        assert say(node, name, "before").status == 200
    body = {"session_id": calm, "message": says("slow", chunks=3, delay_s=0.4)}
    events = iter(node.stream("/chat/stream", body))
    next(events)
    next(events)
    befall(store_server, trouble)
    refused, seconds = timed(node, "POST", "/chat", {"session_id": known, "message": says("x")})
    assert (refused.status, refused.body["code"], seconds < REFUSED_S) == (503, "STORE_UNAVAILABLE", True)
    relieve(store_server, trouble)
    end = list(events)[-1]
    until_ready(cluster)
    told = (end["type"], end.get("code"), end.get("outcome"))
    shown = [m["content"] for m in cluster.history(calm, 1)][1::2]
    if told == ("turn.failed", "STORE_UNAVAILABLE", None):
        assert shown == ["before"]
    else:
        assert (told, shown) == (("turn.finished", None, None), ["before", "slow"])
    assert [m["content"] for m in cluster.history(known, 1)][1::2] == ["before"]


def until_ready(cluster: Cluster) -> None:
    until(lambda: all(node.request("GET", "/ready").status == 200 for node in cluster.nodes))


def check_parents(cluster: Cluster, session_id: str, node: int) -> None:
    """Check that each turn of the session stands on one that is there."""
    turns = cluster.turns(session_id, node)
    ids = {turn["turn_id"] for turn in turns if turn["status"] == "finished"}
    assert [turn for turn in turns if turn["parent"] is not None and turn["parent"] not in ids] == []
    shown = cluster.nodes[node].request("GET", f"/sessions/{session_id}").body
    assert shown["head"] in ids
    assert {message["turn_id"] for message in cluster.history(session_id, node)} <= ids


def test_a_store_that_comes_back_without_its_last_writes(
    store_server: StoreServer, cluster: Cluster, tmp_path: Path
) -> None:
    """Who saw a newer head is told HEAD_MOVED on either node; each turn's parent is there."""
    a, b = cluster.nodes
    until_ready(cluster)
    names = [f"s{number}" for number in range(6)]
    for name in names:
        assert say(a, name, "kept").status == 200
    take_copy(store_server, tmp_path / "copy")
    until_ready(cluster)
    seen: dict[str, str] = {}
    for number, name in enumerate(names):
        lost = say(cluster.nodes[number % 2], name, "lost", Idempotency_Key=f"lost-{name}")
        assert (lost.status, lost.body["turn_count"]) == (200, 2)
        seen[name] = str(a.request("GET", f"/sessions/{name}").headers["etag"])
    slow = {"session_id": "s0", "message": says("in the air", chunks=3, delay_s=1)}
    events = iter(a.stream("/chat/stream", slow))
    in_the_air = next(events)
    next(events)
    bring_back(store_server, tmp_path / "copy")
    until_ready(cluster)
    # The turn that ran on a head which is gone is refused, whatever was stored of it.
    end = list(events)[-1]
    assert (end["type"], end["code"]) == ("turn.failed", "HEAD_MOVED")
    # The node that had the newer turn in memory says so to whoever comes first.
    for number, name in enumerate(names[1:], 1):
        told = say(cluster.nodes[number % 2], name, "unaware")
        assert (told.status, told.body.get("code")) == (409, "HEAD_MOVED"), told.raw
    for name in names:
        for node in cluster.nodes:
            told = say(node, name, "on what I saw", If_Match=seen[name])
            assert (told.status, told.body.get("code")) == (409, "HEAD_MOVED"), told.raw
    for name in names:
        repeat = say(b, name, "lost", Idempotency_Key=f"lost-{name}")
        assert (repeat.status, repeat.body.get("turn_count")) == (200, 2), repeat.raw
        for node in range(2):
            check_parents(cluster, name, node)
            assert [m["content"] for m in cluster.history(name, node)][1::2] == ["kept", "lost"]
    shown = a.request("GET", f"/sessions/s0/turns/{in_the_air['turn_id']}").body
    assert (shown["status"], shown["parent"]) == ("failed", None)
    assert "Traceback" not in cluster.logs()
