"""An owner that pauses: its session goes on elsewhere, and it finds that out."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster import LEASE_S, Cluster, says, until
from tests.modelserver import ModelServer
from tests.storeserver import StoreServer

HALVES = {"chunks": 2, "delay_s": 0.3}


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as model:
        yield model


@pytest.fixture(scope="module")
def cluster(
    store_server: StoreServer, model: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two nodes that the tests of this module share; each test has a session of its own."""
    with Cluster(tmp_path_factory.mktemp("cluster"), [store_server.url] * 2, model) as cluster:
        model.reset()
        yield cluster


def said_by_user(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def test_the_turn_of_a_paused_owner_is_refused(cluster: Cluster, model: ModelServer) -> None:
    """A stops in mid-turn beyond its lease, B commits; A's client gets HEAD_MOVED, history is B's."""
    a, b = cluster.nodes
    first = a.request("POST", "/chat", {"session_id": "paused", "message": says("one")})
    stream = a.stream("/chat/stream", {"session_id": "paused", "message": says("of A", **HALVES) + " A"})
    events = iter(stream)
    started = next(events)
    assert next(events)["type"] == "text.delta"
    cluster.pause(0)
    taken = b.request("POST", "/chat", {"session_id": "paused", "message": says("of B") + " B"})
    assert (taken.status, taken.body["reply"], taken.body["turn_count"]) == (200, "of B", 2)
    assert taken.body["queued_ms"] < 2 * LEASE_S * 1000
    # The model has said all long ago: A could commit as soon as it runs again.
    assert model.stats()["streaming"] == 0
    cluster.resume(0)
    end = list(events)[-1]
    assert (end["type"], end["code"]) == ("turn.failed", "HEAD_MOVED")
    for node in range(2):
        assert [m["content"] for m in cluster.history("paused", node)][1::2] == ["one", "of B"]
        turns = cluster.turns("paused", node)
        assert [(turn["status"], (turn["error"] or {}).get("code")) for turn in turns] == [
            ("finished", None),
            ("failed", "INTERRUPTED"),
            ("finished", None),
        ]
        assert turns[1]["turn_id"] == started["turn_id"]
        assert turns[2]["parent"] == first.body["turn_id"]
    # What A still had in memory is of no use: its next turn knows B's.
    after = a.request("POST", "/chat", {"session_id": "paused", "message": "and now?"})
    assert json.loads(after.body["reply"])["n"] >= 5
    assert "of B" in json.loads(after.body["reply"])["texts"]
    assert "of A" not in json.loads(after.body["reply"])["texts"]


def test_a_turn_that_was_given_up_stays_given_up(cluster: Cluster) -> None:
    """A stops beyond its lease and B ends its turn, though nobody wants the session: A does not revive it."""
    a, _ = cluster.nodes
    stream = a.stream("/chat/stream", {"session_id": "left", "message": says("slow", **HALVES)})
    events = iter(stream)
    turn_id = next(events)["turn_id"]
    next(events)
    cluster.pause(0)
    # The other node ends what its owner has left, within a renewal of it.
    until(lambda: cluster.turns("left", 1)[0]["status"] == "failed", 3 * LEASE_S)
    cluster.resume(0)
    end = list(events)[-1]
    assert (end["type"], end["code"], end["turn_id"]) == ("turn.failed", "HEAD_MOVED", turn_id)
    again = a.request("POST", "/chat", {"session_id": "left", "message": says("again")})
    assert (again.status, again.body["turn_count"]) == (200, 1)


def test_a_repeat_elsewhere_gets_the_turn_of_whoever_has_it(cluster: Cluster, model: ModelServer) -> None:
    """The owner dies; a repeat with the key on the other node runs once, after the lease, and is answered."""
    a, b = cluster.nodes
    key = {"Idempotency-Key": "dead"}
    model.script({"mode": "stall_mid", "text": "half"})
    body = {"session_id": "dead", "message": "hello"}
    stream = a.stream("/chat/stream", body, headers=key)
    events = iter(stream)
    turn_id = next(events)["turn_id"]
    next(events)
    with ThreadPoolExecutor(1) as threads:
        watching = threads.submit(b.request, "POST", "/chat", body, key)
        until(lambda: model.calls().get("hello") == 1)
        cluster.kill(0)
        assert watching.result().status in (503, 200)

    def repeat() -> dict[str, str] | None:
        reply = b.request("POST", "/chat", body, key)
        return reply.body if reply.status == 200 else None

    answered = until(repeat, 5 * LEASE_S)
    assert repeat() == answered
    assert answered["turn_id"] != turn_id
    assert model.calls()["hello"] == 2
    # Who watched the turn that died hears of its end on any node.
    path, seen = f"/sessions/dead/turns/{turn_id}/stream", {"Last-Event-ID": f"{turn_id}:1"}
    end = list(b.stream(path, method="GET", headers=seen))[-1]
    assert (end["type"], end["code"]) == ("turn.failed", "INTERRUPTED")
    codes = [(turn["status"], (turn["error"] or {}).get("code")) for turn in cluster.turns("dead", 1)]
    assert codes == [("failed", "INTERRUPTED"), ("finished", None)]
    cluster.nodes[0].start()
