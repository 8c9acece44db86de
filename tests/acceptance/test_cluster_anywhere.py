"""Any node serves any session: each request of a story goes to the node that has least to do with it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.cluster import LEASE_S, Cluster, says, until
from tests.modelserver import ModelServer
from tests.serverprocess import EventReader, ServerProcess
from tests.storeserver import STORES, open_store_server

SLOW = says("one two three four five six", chunks=6, delay_s=0.2)
STUCK = '[[{"mode": "stall_mid", "text": "begun", "comments": true}]]'


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as model:
        yield model


@pytest.fixture(scope="module", params=STORES)
def cluster(
    request: pytest.FixtureRequest, model: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two nodes that the tests of this module share; each test has sessions of its own."""
    folder = tmp_path_factory.mktemp("cluster")
    model.reset()
    with (
        open_store_server(request.param) as server,
        Cluster(folder, [server.url] * 2, model) as cluster,
    ):
        yield cluster


def begin(node: ServerProcess, session_id: str, message: str, **headers: str) -> tuple[EventReader, str]:
    """Begin a turn and return its stream, and its id."""
    stream = node.stream("/chat/stream", {"session_id": session_id, "message": message}, headers=headers)
    assert stream.status == 200
    return stream, stream.headers["x-turn-id"]


def watch(node: ServerProcess, session_id: str, turn_id: str, **headers: str) -> EventReader:
    path = f"/sessions/{session_id}/turns/{turn_id}/stream"
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return node.stream(path, method="GET", headers=sent)


def test_a_conversation_goes_from_node_to_node(cluster: Cluster) -> None:
    """Ten turns by turns on two nodes: the model is told the whole conversation each time."""
    for number in range(10):
        node = cluster.nodes[number % 2]
        reply = node.request("POST", "/chat", {"session_id": "talk", "message": f"message {number}"})
        assert (reply.status, reply.body["turn_count"]) == (200, number + 1)
        texts = json.loads(reply.body["reply"])["texts"]
        assert [text for text in texts if text.startswith("message")] == [
            f"message {n}" for n in range(number + 1)
        ]
    histories = [cluster.history("talk", node) for node in range(2)]
    assert histories[0] == histories[1]


def test_a_stream_is_followed_and_resumed_elsewhere(cluster: Cluster) -> None:
    """The other node sends a running turn's events, all of them or those behind Last-Event-ID; later, too."""
    here, there = cluster.nodes
    own, turn_id = begin(here, "watched", SLOW)
    events = iter(own)
    first = [next(events), next(events)]
    whole = watch(there, "watched", turn_id)
    rest = watch(there, "watched", turn_id, Last_Event_ID=f"{turn_id}:2")
    with ThreadPoolExecutor(2) as threads:
        seen, behind = (threads.submit(list, stream) for stream in (whole, rest))
        told = first + list(events)
    assert seen.result() == told
    assert behind.result() == told[2:]
    assert "".join(e["text"] for e in told if e["type"] == "text.delta") == "one two three four five six"
    late = list(watch(there, "watched", turn_id, Last_Event_ID=f"{turn_id}:{len(told) - 1}"))
    assert late == told[-1:]
    nothing = watch(there, "watched", turn_id, Last_Event_ID=f"{turn_id}:{len(told)}")
    assert (nothing.status, list(nothing)) == (204, [])


def test_a_turn_is_seen_and_cancelled_elsewhere(cluster: Cluster) -> None:
    """The other node names the running turn and those that wait, and its cancel ends them."""
    here, there = cluster.nodes
    own, turn_id = begin(here, "cancelled", STUCK)
    events = iter(own)
    next(events)
    with ThreadPoolExecutor(1) as threads:
        body = {"session_id": "cancelled", "message": says("next")}
        waiting = threads.submit(there.request, "POST", "/chat", body)
        active = until(lambda: active_with_waiting(here, "cancelled"))
        assert (active["turn_id"], active["status"]) == (turn_id, "running")
        assert active_with_waiting(there, "cancelled")["waiting"] == active["waiting"]
        asked = there.request("POST", "/sessions/cancelled/cancel", {"keep_partial": True})
        assert (asked.status, asked.body["turn_id"]) == (202, turn_id)
        end = list(events)[-1]
        assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "user", True)
        assert (waiting.result().status, waiting.result().body["turn_count"]) == (200, 2)
    assert there.request("GET", "/sessions/cancelled/turns/active").body["code"] == "NO_ACTIVE_TURN"
    assert [m["content"] for m in cluster.history("cancelled", 1)][1::2] == ["begun", "next"]


def active_with_waiting(node: ServerProcess, session_id: str) -> dict[str, Any]:
    shown = node.request("GET", f"/sessions/{session_id}/turns/active")
    return dict(shown.body) if shown.status == 200 and shown.body["waiting"] else {}


def test_a_waiting_turn_is_woken(cluster: Cluster) -> None:
    """A turn that waits for one on the other node begins when that ends, not at the next look."""
    here, there = cluster.nodes
    own, _ = begin(here, "woken", says("first", chunks=2, delay_s=0.5))
    waiting = there.request("POST", "/chat", {"session_id": "woken", "message": says("second")})
    end = list(own)[-1]
    first, second = cluster.turns("woken")
    assert (end["type"], waiting.status) == ("turn.finished", 200)
    assert first["turn_id"] == second["parent"]
    waited_ms = waiting.body["queued_ms"]
    assert waited_ms < 1500 < LEASE_S * 1000


@pytest.mark.parametrize("policy", ["interrupt", "rollback"])
def test_a_turn_makes_way_for_one_elsewhere(cluster: Cluster, policy: str) -> None:
    """An interrupt or a rollback on the other node ends the turn, keeping what it said or not."""
    here, there = cluster.nodes
    own, _ = begin(here, policy, STUCK)
    events = iter(own)
    next(events)
    next(events)
    body = {"session_id": policy, "message": says("mine"), "on_busy": policy}
    mine = there.request("POST", "/chat", body)
    end = list(events)[-1]
    assert (mine.status, end["type"], end["reason"]) == (200, "turn.cancelled", policy)
    kept = ["begun", "mine"] if policy == "interrupt" else ["mine"]
    assert [m["content"] for m in cluster.history(policy, 0)][1::2] == kept
    refused = {"session_id": f"{policy}-2", "message": "no", "on_busy": "reject"}
    own, turn_id = begin(here, f"{policy}-2", SLOW)
    busy = there.request("POST", "/chat", refused)
    assert (busy.status, busy.body["code"], busy.body["turn_id"]) == (409, "SESSION_BUSY", turn_id)
    assert list(own)[-1]["type"] == "turn.finished"


def test_a_repeat_elsewhere_is_the_same_turn(cluster: Cluster, model: ModelServer) -> None:
    """A key that one node has is known to the other, while its turn runs and after: one model call."""
    here, there = cluster.nodes
    own, turn_id = begin(here, "repeat", SLOW + " repeat", **{"Idempotency-Key": "anywhere"})
    again, same = begin(there, "repeat", SLOW + " repeat", **{"Idempotency-Key": "anywhere"})
    assert same == turn_id
    with ThreadPoolExecutor(1) as threads:
        repeated = threads.submit(list, again)
        assert repeated.result() == list(own)
    body = {"session_id": "repeat", "message": SLOW + " repeat"}
    key = {"Idempotency-Key": "anywhere"}
    replies = [node.request("POST", "/chat", body, key).body for node in cluster.nodes]
    assert (replies[0], replies[0]["turn_id"]) == (replies[1], turn_id)
    other = there.request("POST", "/chat", body | {"message": "else"}, key)
    assert (other.status, other.body["code"]) == (422, "IDEMPOTENCY_MISMATCH")
    assert model.calls()[SLOW + " repeat"] == 1


def test_a_session_deleted_elsewhere_is_gone(cluster: Cluster) -> None:
    """A delete on the other node ends the turn that runs, and the session; its name begins anew."""
    here, there = cluster.nodes
    here.request("POST", "/chat", {"session_id": "deleted", "message": says("old")})
    own, _ = begin(here, "deleted", STUCK)
    events = iter(own)
    next(events)
    assert there.request("DELETE", "/sessions/deleted").status == 200
    assert list(events)[-1]["type"] in ("turn.cancelled", "turn.failed")
    for node in cluster.nodes:
        assert node.request("GET", "/sessions/deleted").status == 404
    anew = here.request("POST", "/chat", {"session_id": "deleted", "message": "anew"})
    assert (anew.status, anew.body["turn_count"]) == (200, 1)
    assert "old" not in json.loads(anew.body["reply"])["texts"]


def test_a_rewind_waits_for_a_turn_elsewhere(cluster: Cluster) -> None:
    """A move of the head and a turn on the other node take turns; the stale agent is not used."""
    here, there = cluster.nodes
    for word in ("one", "two"):
        here.request("POST", "/chat", {"session_id": "moved", "message": says(word)})
    own, turn_id = begin(here, "moved", SLOW)
    busy = there.request("POST", "/sessions/moved/rewind", {"turns": 2, "on_busy": "reject"})
    assert (busy.status, busy.body["code"]) == (409, "SESSION_BUSY")
    moved = there.request("POST", "/sessions/moved/rewind", {"turns": 2})
    assert moved.status == 200
    assert list(own)[-1]["head"] == turn_id
    after = here.request("POST", "/chat", {"session_id": "moved", "message": "after"})
    texts = json.loads(after.body["reply"])["texts"]
    assert ("one" in texts, "two" in texts, "after" in texts) == (True, False, True)


def test_both_nodes_count_and_list_the_same(cluster: Cluster) -> None:
    """Lists, statistics, a session, its record, state, turns and events are the same from each node."""
    for number in range(4):
        node = cluster.nodes[number % 2]
        body = {"session_id": f"listed-{number}", "message": says("x"), "user_id": "lister"}
        assert node.request("POST", "/chat", body).status == 200
    cluster.nodes[0].request("PATCH", "/sessions/listed-0", {"title": "titled"})
    cluster.nodes[1].request("PATCH", "/sessions/listed-0/state", {"state": {"colour": "green"}})
    for path in (
        "/sessions?user_id=lister",
        "/sessions?user_id=lister&limit=2",
        "/sessions/listed-0",
        "/sessions/listed-0/state",
        "/sessions/listed-0/turns",
        "/sessions/listed-0/events",
        "/sessions/stats",
        "/users/lister/usage",
    ):
        answers = [node.request("GET", path) for node in cluster.nodes]
        assert [answer.status for answer in answers] == [200, 200], path
        assert of_no_node(answers[0].body) == of_no_node(answers[1].body), path
    shown = cluster.nodes[0].request("GET", "/sessions?user_id=lister&limit=2").body
    rest = (
        cluster.nodes[1]
        .request("GET", f"/sessions?user_id=lister&limit=2&cursor={shown['next_cursor']}")
        .body
    )
    names = [session["session_id"] for page in (shown, rest) for session in page["sessions"]]
    assert sorted(names) == [f"listed-{number}" for number in range(4)]


def of_no_node(shown: Any) -> Any:
    """Return what a node shows without what it says of itself, and without its seals."""
    if isinstance(shown, list):
        return [of_no_node(each) for each in shown]
    if not isinstance(shown, dict):
        return shown
    return {name: of_no_node(value) for name, value in shown.items() if name not in ("live", "next_cursor")}
