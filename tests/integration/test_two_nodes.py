"""Two nodes in one process, over one store in memory: any of them serves any session, over HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from typing import Any

import httpx2
import pytest
import uvicorn

from app.config import Settings
from app.domain.erasure import Erased
from app.domain.errors import SnapshotUnreadable, StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.lease import Holder, Node
from app.domain.session import LifeSpan, Path, Session
from app.domain.turn import TurnStatus
from app.main import create_app
from app.nodes.address import url_of
from app.runtime import Runtime
from app.server import bind
from app.stores.memory.shared import Lease, SharedMemoryStore
from tests.modelserver import ModelServer

LEASE_S = 1.0
PROMPTLY_S = 5.0
SLOW = '[[{"mode": "text", "text": "one two three four five six", "chunks": 6, "delay_s": 0.15}]]'
STUCK = '[[{"mode": "stall_mid", "text": "begun", "comments": true}]]'


class LoopServer(uvicorn.Server):
    """A server that shares the loop with others and leaves the signals alone."""

    capture_signals = nullcontext  # type: ignore[assignment]


class LocalNode:
    """One node: its runtime, and a client of its public port."""

    def __init__(self, runtime: Runtime, client: httpx2.AsyncClient, private_url: str) -> None:
        self.runtime = runtime
        self.client = client
        self.private_url = private_url

    async def chat(self, session_id: str, message: str, **body: Any) -> httpx2.Response:
        return await self.client.post("/chat", json={"session_id": session_id, "message": message, **body})


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def store() -> SharedMemoryStore:
    return SharedMemoryStore(LifeSpan(), lease_s=LEASE_S)


@pytest.fixture
async def nodes(model: ModelServer, store: SharedMemoryStore) -> AsyncIterator[tuple[LocalNode, LocalNode]]:
    model.reset()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serve_node(store, model))
        yield first, await stack.enter_async_context(serve_node(store.beside(), model))


@asynccontextmanager
async def serve_node(
    store: SharedMemoryStore, model: ModelServer, **settings: Any
) -> AsyncIterator[LocalNode]:
    common = {"openai_api_key": "k", "openai_base_url": model.base_url, "session_queue_wait_s": 10.0}
    config = Settings(_env_file=None, **common, **settings)
    public, private = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    runtime = Runtime(config, store=store, node_url=url_of(private))
    app = create_app(runtime=runtime, node_port=private.getsockname()[1])
    server = LoopServer(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
    async with runtime, asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve(sockets=[public, private]))
        async with httpx2.AsyncClient(base_url=url_of(public), timeout=20) as client:
            yield LocalNode(runtime, client, url_of(private))
        server.should_exit = True


async def until(condition: Any) -> None:
    """Return once ``condition()`` holds; what it waits for happens in this very loop."""
    async with asyncio.timeout(PROMPTLY_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def begin_turn(node: LocalNode, session_id: str, message: str, **headers: str) -> tuple[Any, str]:
    """Return the response of a stream that has begun, and its turn's id."""
    request = node.client.build_request(
        "POST", "/chat/stream", json={"session_id": session_id, "message": message}, headers=headers
    )
    response = await node.client.send(request, stream=True)
    assert response.status_code == 200, await response.aread()
    return response, response.headers["x-turn-id"]


async def read_events(response: Any) -> list[dict[str, Any]]:
    lines = [line async for line in response.aiter_lines()]
    await response.aclose()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "text.delta")


async def test_a_conversation_goes_on_wherever_it_is_sent(nodes: tuple[LocalNode, LocalNode]) -> None:
    """Eight turns by turns on two nodes: the model is sent the whole path each time, whoever asks."""
    for number in range(8):
        reply = await nodes[number % 2].chat("s", f"message {number}")
        assert reply.status_code == 200, reply.text
        told = json.loads(reply.json()["reply"])
        assert [text for text in told["texts"] if text.startswith("message")] == [
            f"message {n}" for n in range(number + 1)
        ]
        assert reply.json()["turn_count"] == number + 1


async def test_a_session_deleted_elsewhere_is_made_anew(nodes: tuple[LocalNode, LocalNode]) -> None:
    """What one node remembers of a session that another deleted is not believed."""
    here, there = nodes
    await here.chat("s", "before")
    assert (await there.client.delete("/sessions/s")).status_code == 200
    reply = await here.chat("s", "after")
    assert reply.status_code == 200, reply.text
    assert "before" not in reply.json()["reply"]
    assert (await there.client.delete("/sessions/s")).status_code == 200
    await there.chat("s", "again", user_id="u")
    assert (await here.chat("s", "mine", user_id="u")).json()["turn_count"] == 2


async def test_a_change_made_elsewhere_counts_in_the_next_turn(nodes: tuple[LocalNode, LocalNode]) -> None:
    """An archived session refuses, a reopened one answers, and an old head is told, on either node."""
    here, there = nodes
    first = (await here.chat("s", "one")).json()
    await there.client.patch("/sessions/s", json={"status": "archived"})
    assert (await here.chat("s", "two")).json()["code"] == "SESSION_ARCHIVED"
    await there.client.patch("/sessions/s", json={"status": "active"})
    assert (await here.chat("s", "two")).status_code == 200
    await there.chat("s", "three")
    body = {"session_id": "s", "message": "four"}
    etag = (await there.client.get("/sessions/s")).headers["etag"]
    for node in nodes:
        late = await node.client.post("/chat", json=body, headers={"If-Match": f'"{first["head"]}.1"'})
        assert (late.status_code, late.json()["code"]) == (409, "HEAD_MOVED")
    assert (await here.client.post("/chat", json=body, headers={"If-Match": etag})).status_code == 200


async def test_a_turn_is_watched_from_another_node(nodes: tuple[LocalNode, LocalNode]) -> None:
    """A stream is followed live through the other node, from the start and from the middle."""
    here, there = nodes
    own, turn_id = await begin_turn(here, "s", SLOW)
    path = f"/sessions/s/turns/{turn_id}/stream"
    async with there.client.stream("GET", path) as whole:
        assert whole.headers["x-turn-id"] == turn_id
        seen = await read_events(whole)
    assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))
    assert text_of(seen) == "one two three four five six"
    assert await read_events(own) == seen
    late = await there.client.get(path, headers={"Last-Event-ID": f"{turn_id}:2"})
    assert parse(late)[-1] == seen[-1]


def parse(response: httpx2.Response) -> list[dict[str, Any]]:
    lines = response.text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


async def test_a_resume_in_the_middle_goes_to_the_running_turn(nodes: tuple[LocalNode, LocalNode]) -> None:
    """With Last-Event-ID the other node sends what came after it, live, and nothing twice."""
    here, there = nodes
    own, turn_id = await begin_turn(here, "s", SLOW)
    headers = {"Last-Event-ID": f"{turn_id}:2"}
    async with there.client.stream("GET", f"/sessions/s/turns/{turn_id}/stream", headers=headers) as rest:
        seen = await read_events(rest)
    assert (await read_events(own))[2:] == seen


async def test_a_turn_is_cancelled_and_listed_from_another_node(nodes: tuple[LocalNode, LocalNode]) -> None:
    """The other node knows who runs and who waits, and a cancel there ends the turn here."""
    here, there = nodes
    own, turn_id = await begin_turn(here, "s", STUCK)
    waiting = asyncio.ensure_future(here.chat("s", "next"))
    await until(lambda: here.runtime.turns_in_flight == 2)
    active = (await there.client.get("/sessions/s/turns/active")).json()
    assert active["turn_id"] == turn_id
    assert len(active["waiting"]) == 1
    cancelled = await there.client.post("/sessions/s/cancel", json={"keep_partial": True})
    assert (cancelled.status_code, cancelled.json()["turn_id"]) == (202, turn_id)
    assert (await read_events(own))[-1]["type"] == "turn.cancelled"
    assert (await waiting).status_code == 200
    gone = await there.client.post("/sessions/s/cancel", json={})
    assert gone.json()["code"] == "NO_ACTIVE_TURN"


async def test_who_waits_is_not_cancelled_for_who_runs(nodes: tuple[LocalNode, LocalNode]) -> None:
    """A cancel means the turn that runs, also where only one waits for it; each node lists both."""
    here, there = nodes
    own, turn_id = await begin_turn(here, "s", STUCK)
    waiting = asyncio.ensure_future(there.chat("s", "next"))
    await until(lambda: there.runtime.turns_in_flight == 1)
    for node in nodes:
        active = (await node.client.get("/sessions/s/turns/active")).json()
        assert (active["turn_id"], len(active["waiting"])) == (turn_id, 1)
    cancelled = await there.client.post("/sessions/s/cancel", json={"keep_partial": False})
    assert (cancelled.status_code, cancelled.json()["turn_id"]) == (202, turn_id)
    assert (await read_events(own))[-1]["type"] == "turn.cancelled"
    assert (await waiting).json()["turn_count"] == 1


async def test_a_node_that_drains_passes_its_turns_on(nodes: tuple[LocalNode, LocalNode]) -> None:
    """New turns, and those that wait, are another node's; the drain lasts until they have ended."""
    here, there = nodes
    own, _ = await begin_turn(here, "s", SLOW)
    waiting = asyncio.ensure_future(here.chat("s", "next"))
    await until(lambda: here.runtime.turns_in_flight == 2)
    here.runtime.begin_drain()
    passed, turn_id = await begin_turn(here, "t", SLOW)
    assert there.runtime._turns.get(turn_id) is not None
    assert here.runtime.is_busy
    assert (await read_events(own))[-1]["type"] == "turn.finished"
    assert (await read_events(passed))[-1]["type"] == "turn.finished"
    assert (await waiting).json()["turn_count"] == 2
    assert (await here.chat("t", "more")).json()["turn_count"] == 2
    await until(lambda: not here.runtime.is_busy)


async def test_nodes_that_all_drain_refuse(nodes: tuple[LocalNode, LocalNode]) -> None:
    """If no node takes turns, clients are told so, and nothing is begun."""
    for node in nodes:
        node.runtime.begin_drain()
    for node in nodes:
        refused = await node.chat("s", "one")
        assert (refused.status_code, refused.json()["code"]) == (503, "DRAINING")
        assert refused.headers["retry-after"] == "1"
    assert (await nodes[0].client.get("/sessions/s")).status_code == 404


async def test_a_turn_that_a_drain_ended_is_not_begun_again(nodes: tuple[LocalNode, LocalNode]) -> None:
    """What it has said is kept; no other node is asked to say it once more."""
    here, there = nodes
    asked = asyncio.ensure_future(here.chat("s", STUCK))
    await until(lambda: here.runtime.turns_in_flight == 1 and here.runtime._turns.all()[0].turn is not None)
    here.runtime.begin_drain()
    await here.runtime.cancel_turns()
    answer = await asked
    assert (answer.status_code, answer.json()["code"]) == (503, "DRAINING")
    turns = (await there.client.get("/sessions/s/turns")).json()["turns"]
    assert [turn["status"] for turn in turns] == ["cancelled"]


async def test_busy_policies_count_on_every_node(nodes: tuple[LocalNode, LocalNode]) -> None:
    """While a turn runs on one node another one refuses, waits or interrupts, as it is told to."""
    here, there = nodes
    own, turn_id = await begin_turn(here, "s", STUCK)
    await until(lambda: here.runtime._turns.all()[0].log.events[1:])  # it has said something
    busy = await there.chat("s", "no", on_busy="reject")
    assert (busy.status_code, busy.json()["code"], busy.json()["turn_id"]) == (409, "SESSION_BUSY", turn_id)
    flight = here.runtime._turns.get(turn_id)
    await until(lambda: flight is not None and len(flight.log.events) > 1)  # it has said something
    interrupting = await there.chat("s", "stop that", on_busy="interrupt")
    assert interrupting.status_code == 200, interrupting.text
    ended = (await read_events(own))[-1]
    assert (ended["type"], ended["reason"]) == ("turn.cancelled", "interrupt")
    assert interrupting.json()["turn_count"] == 2  # the partial answer was kept
    own, _ = await begin_turn(there, "s", SLOW)
    queued = await here.chat("s", "me too")
    assert queued.json()["turn_count"] == 4
    assert (await read_events(own))[-1]["type"] == "turn.finished"


async def test_a_repeat_gets_the_turn_of_another_node(
    nodes: tuple[LocalNode, LocalNode], model: ModelServer
) -> None:
    """A key used on one node is known on the other, while its turn runs and afterwards."""
    here, there = nodes
    own, turn_id = await begin_turn(here, "s", SLOW, **{"Idempotency-Key": "k"})
    repeat, same = await begin_turn(there, "s", SLOW, **{"Idempotency-Key": "k"})
    assert same == turn_id
    events = await read_events(own)
    assert await read_events(repeat) == events
    body = {"session_id": "s", "message": SLOW}
    again = await there.client.post("/chat", json=body, headers={"Idempotency-Key": "k"})
    assert (again.json()["turn_id"], again.json()["reply"]) == (turn_id, "one two three four five six")
    other = await there.client.post(
        "/chat", json=body | {"message": "else"}, headers={"Idempotency-Key": "k"}
    )
    assert other.json()["code"] == "IDEMPOTENCY_MISMATCH"
    assert len(model.requests()) == 1


async def test_a_delete_ends_the_turn_of_another_node(nodes: tuple[LocalNode, LocalNode]) -> None:
    """The turn of a session that is deleted elsewhere is cancelled, and leaves nothing."""
    here, there = nodes
    own, _ = await begin_turn(here, "s", STUCK)
    assert (await there.client.delete("/sessions/s")).status_code == 200
    events = await read_events(own)
    assert events[-1]["type"] in ("turn.cancelled", "turn.failed")
    assert (await here.client.get("/sessions/s")).status_code == 404


async def test_a_rewind_waits_for_the_turn_of_another_node(nodes: tuple[LocalNode, LocalNode]) -> None:
    """A move of the head and a turn elsewhere come one after the other."""
    here, there = nodes
    await here.chat("s", "one")
    own, turn_id = await begin_turn(here, "s", SLOW)
    refused = await there.client.post("/sessions/s/rewind", json={"turns": 1, "on_busy": "reject"})
    assert refused.json()["code"] == "SESSION_BUSY"
    moved = await there.client.post("/sessions/s/rewind", json={"turns": 1})
    assert moved.status_code == 200, moved.text
    events = await read_events(own)
    assert events[-1]["head"] == turn_id
    assert (await here.chat("s", "two")).json()["turn_count"] == 2


async def test_a_turn_whose_lease_is_lost_ends(
    nodes: tuple[LocalNode, LocalNode], store: SharedMemoryStore
) -> None:
    """Once another process has the session the turn is stopped, its agent dropped, its client told."""
    here, there = nodes
    await here.chat("s", "one")
    own, turn_id = await begin_turn(here, "s", STUCK)
    key = SessionKey("", "s")
    store._content.leases.clear()  # as a store that was restored: nobody has anything
    leases = there.runtime._store.leases
    assert leases is not None
    await leases.take(key, "another")
    ended = (await read_events(own))[-1]
    assert (ended["type"], ended["code"]) == ("turn.failed", "HEAD_MOVED")
    assert not here.runtime.agents.is_live(key)
    await leases.give_back(key, "another")
    assert (await there.chat("s", "two")).status_code == 200
    turns = (await there.client.get("/sessions/s/turns")).json()["turns"]
    assert [t["status"] for t in turns if t["turn_id"] == turn_id] == [TurnStatus.FAILED]


async def test_a_long_turn_keeps_its_lease(nodes: tuple[LocalNode, LocalNode]) -> None:
    """A turn that takes several leases' time is renewed, and committed."""
    here, there = nodes
    own, _ = await begin_turn(
        here, "s", '[[{"mode": "text", "text": "a b c d e f", "chunks": 6, "delay_s": 0.5}]]'
    )
    waiting = asyncio.ensure_future(there.chat("s", "then"))
    events = await read_events(own)
    assert events[-1]["type"] == "turn.finished"
    assert (await waiting).json()["turn_count"] == 2


async def test_what_a_store_has_lost_is_told(
    nodes: tuple[LocalNode, LocalNode], store: SharedMemoryStore
) -> None:
    """If the store comes back without a turn that a node has seen, the next turn there is refused, once."""
    here, there = nodes
    await here.chat("s", "one")
    record = store._records[SessionKey("", "s")]
    older = record.session
    lost = (await here.chat("s", "two")).json()["head"]
    del record.turns[lost], record.sizes[lost], record.states[lost]
    record.session = older
    told = await here.chat("s", "three")
    assert (told.status_code, told.json()["code"]) == (409, "HEAD_MOVED")
    after = await here.chat("s", "three")
    assert (after.status_code, after.json()["turn_count"]) == (200, 2)
    assert "two" not in after.json()["reply"]
    assert (await there.chat("s", "four")).status_code == 200


async def test_a_turn_never_stands_on_one_that_is_lost(
    nodes: tuple[LocalNode, LocalNode], store: SharedMemoryStore
) -> None:
    """What ran while the store lost its parent is on record beside the root."""
    here, there = nodes
    await here.chat("s", "one")
    record = store._records[SessionKey("", "s")]
    older = record.session
    lost = (await here.chat("s", "two")).json()["head"]
    own, turn_id = await begin_turn(here, "s", STUCK)
    for kept in (record.turns, record.sizes, record.states):
        kept.pop(lost, None), kept.pop(turn_id, None)
    record.session = older
    await there.client.post("/sessions/s/cancel", json={"keep_partial": False})
    assert (await read_events(own))[-1]["type"] == "turn.cancelled"
    turns = (await there.client.get("/sessions/s/turns")).json()["turns"]
    assert [(turn["turn_id"], turn["parent"]) for turn in turns] == [(turn_id, None), (older.head, None)]


class RememberingStore(SharedMemoryStore):
    """Remembers one record, and misses a turn that is gone, as stores do that are far away."""

    remembered: Session | None = None

    def recall_session(self, key: SessionKey) -> Session | None:  # type: ignore[override]
        return self.remembered

    async def load_path(self, session: Session) -> Path:
        try:
            return await super().load_path(session)
        except KeyError:
            raise SnapshotUnreadable(session_id=session.key.session_id) from None


async def test_a_record_that_outlived_its_turns_is_told(model: ModelServer) -> None:
    """A node that has read of a turn, but not the turn, says so too when the store comes back without it."""
    store = RememberingStore(LifeSpan(), lease_s=LEASE_S)
    async with serve_node(store, model) as here, serve_node(store.beside(), model) as there:
        await here.chat("s", "one")
        record = store._records[SessionKey("", "s")]
        older = record.session
        lost = (await there.chat("s", "two")).json()["head"]
        store.remembered = record.session
        del record.turns[lost], record.sizes[lost], record.states[lost]
        record.session = older
        told = await here.chat("s", "three")
        assert (told.status_code, told.json()["code"]) == (409, "HEAD_MOVED")
        store.remembered = None
        assert (await here.chat("s", "three")).json()["turn_count"] == 2


async def test_strangers_learn_nothing_on_the_nodes_port(nodes: tuple[LocalNode, LocalNode]) -> None:
    """Without the secret the private port says 404 to all, and the public one knows no such routes."""
    here, _ = nodes
    assert here.runtime.link is not None
    link = here.runtime.link
    question = {"owner": "", "session_id": "s"}
    async with httpx2.AsyncClient() as stranger:
        for headers in ({}, {"X-AgentPool-Node": "x" * 43}, {"X-AgentPool-Node": ""}):
            for path in ("/health", "/node/turns", "/sessions"):
                answer = await stranger.post(here.private_url + path, json=question, headers=headers)
                assert (answer.status_code, answer.content) == (404, b"")
        proof = link.prove(link.here, "POST", b"/node/turns").decode()
        known = {"X-AgentPool-Node": proof}
        answer = await stranger.post(here.private_url + "/node/turns", json=question, headers=known)
        assert answer.json() == {"turns": []}
        elsewhere = link.prove(Node("another boot"), "POST", b"/node/turns").decode()
        for path, given in (("/node/cancel", proof), ("/node/turns", elsewhere), ("/node/turns?a=b", proof)):
            headers = {"X-AgentPool-Node": given}
            answer = await stranger.post(here.private_url + path, json=question, headers=headers)
            assert (answer.status_code, answer.content) == (404, b"")
    refused = await here.client.post("/node/turns", json=question)
    assert (refused.status_code, refused.json()["code"]) == (404, "NOT_FOUND")
    schema = (await here.client.get("/openapi.json")).text
    assert "/node/" not in schema


async def test_a_node_that_is_gone_is_named_as_such(nodes: tuple[LocalNode, LocalNode]) -> None:
    """A turn of a node that does not answer cannot be watched now: 503, and to be tried again."""
    here, there = nodes
    own, turn_id = await begin_turn(here, "s", STUCK)
    link = there.runtime.link
    assert link is not None
    await link.close()  # as if no node could be reached from there
    answer = await there.client.get(f"/sessions/s/turns/{turn_id}/stream")
    assert (answer.status_code, answer.json()["code"]) == (503, "NODE_UNREACHABLE")
    assert answer.headers["retry-after"] == "1"
    answer = await there.client.post("/sessions/s/cancel", json={})
    assert answer.json()["code"] == "NODE_UNREACHABLE"
    await here.client.post("/sessions/s/cancel", json={})
    assert (await read_events(own))[-1]["type"] == "turn.cancelled"


async def test_one_of_two_resumes_makes_the_session(nodes: tuple[LocalNode, LocalNode]) -> None:
    """Of resumes of one user on both nodes at once one makes the session, and all get it."""
    resumes = [nodes[n % 2].client.post("/sessions/resume", json={"user_id": "u"}) for n in range(8)]
    answers = await asyncio.gather(*resumes)
    assert len({answer.json()["session_id"] for answer in answers}) == 1
    assert sorted(answer.status_code for answer in answers)[-1] == 201


async def test_an_operator_sees_and_steers_every_node_from_each(nodes: tuple[LocalNode, LocalNode]) -> None:
    """Nodes are listed with their counters; lists, cleanups and evictions reach the node that is meant."""
    here, there = nodes
    await here.chat("a", "one")
    await there.chat("b", "one")
    listed = (await here.client.get("/agent-nodes")).json()["nodes"]
    assert [node["is_here"] for node in listed] == [True, False]
    assert [node["stats"]["idle_agents"] for node in listed] == [1, 1]
    other = listed[1]["node"]
    live = (await here.client.get("/agent-sessions", params={"node": other})).json()
    assert [one["session_id"] for one in live["sessions"]] == ["b"]
    cleanup = await here.client.post(
        "/agent-cleanup", params={"node": other}, json={"mode": "oldest", "count": 5, "dry_run": True}
    )
    assert cleanup.json()["removed"] == 1
    assert (await here.client.delete("/agent-sessions/b")).status_code == 200
    assert not there.runtime.agents.is_live(SessionKey("", "b"))
    assert (await here.client.delete("/agent-sessions/b")).json()["code"] == "AGENT_NOT_FOUND"
    unknown = await here.client.get("/agent-stats", params={"node": "nobody"})
    assert (unknown.status_code, unknown.json()["code"]) == (422, "VALIDATION_ERROR")
    link = here.runtime.link
    assert link is not None
    await link.close()
    listed = (await here.client.get("/agent-nodes")).json()["nodes"]
    assert [node["stats"] is None for node in listed] == [False, True]
    gone = await here.client.get("/agent-stats", params={"node": other})
    assert gone.json()["code"] == "NODE_UNREACHABLE"


# -- what waits for another node's turn waits as it would here


async def wait_elsewhere(node: LocalNode, session_id: str, message: str, **body: Any) -> "asyncio.Task[Any]":
    """Send a turn that has to wait for another node's; return when it does."""
    before = len(node.runtime._conductor._waiting_elsewhere)
    asked = asyncio.get_running_loop().create_task(node.chat(session_id, message, **body))
    await until(lambda: len(node.runtime._conductor._waiting_elsewhere) > before or asked.done())
    return asked


async def test_a_waiting_turn_whose_client_leaves_is_dropped(nodes: tuple[LocalNode, LocalNode]) -> None:
    """It never runs, as a turn that waits for one of its own node."""
    here, there = nodes
    own, turn_id = await begin_turn(here, "s", SLOW)
    (await wait_elsewhere(there, "s", "second")).cancel()
    await until(lambda: there.runtime.turns_in_flight == 0)
    assert (await read_events(own))[-1]["type"] == "turn.finished"
    turns = (await here.client.get("/sessions/s/turns")).json()["turns"]
    assert [turn["turn_id"] for turn in turns] == [turn_id]


async def test_a_waiting_turn_holds_no_place_and_keeps_no_drain(nodes: tuple[LocalNode, LocalNode]) -> None:
    """While it waits no agent is counted as working, and a node that drains does not wait for it."""
    here, there = nodes
    own, _ = await begin_turn(here, "s", STUCK)
    waiting = await wait_elsewhere(there, "s", "second")
    assert there.runtime.agents.stats().active == 0
    there.runtime.begin_drain()
    await until(lambda: there.runtime.turns_in_flight == 0)
    assert not waiting.done()  # it was passed on to the node that has the session
    await here.client.post("/sessions/s/cancel", json={"keep_partial": False})
    assert (await read_events(own))[-1]["type"] == "turn.cancelled"
    assert (await waiting).status_code == 200


async def test_waiting_turns_survive_an_interrupt(nodes: tuple[LocalNode, LocalNode]) -> None:
    """Only the turn that runs is interrupted, on whichever node the others wait, and they come after it."""
    here, there = nodes
    own, _ = await begin_turn(here, "s", STUCK)
    queued = [await wait_elsewhere(there, "s", "waits there")]
    queued.append(asyncio.get_running_loop().create_task(here.chat("s", "waits here")))
    await until(lambda: here.runtime.turns_in_flight == 2)
    interrupting = await there.chat("s", "stop that", on_busy="interrupt")
    assert interrupting.status_code == 200, interrupting.text
    assert (await read_events(own))[-1]["reason"] == "interrupt"
    assert [(await one).status_code for one in queued] == [200, 200]


async def test_as_many_turns_wait_as_would_here(nodes: tuple[LocalNode, LocalNode]) -> None:
    """Beyond the queue's depth a turn is refused, also where all wait for another node."""
    here, there = nodes
    own, _ = await begin_turn(here, "s", STUCK)
    depth = there.runtime.settings.session_queue_depth
    waiting = [await wait_elsewhere(there, "s", f"number {n}") for n in range(depth)]
    refused = await there.chat("s", "one too many")
    assert (refused.status_code, refused.json()["code"]) == (429, "TURN_QUEUE_FULL")
    await here.client.post("/sessions/s/cancel", json={"keep_partial": False})
    await read_events(own)
    assert [(await one).status_code for one in waiting] == [200] * depth


async def test_a_deleted_session_is_not_made_anew_by_who_waited(nodes: tuple[LocalNode, LocalNode]) -> None:
    """A turn that waited for a session that was deleted meanwhile is told so."""
    here, there = nodes
    own, _ = await begin_turn(here, "s", STUCK)
    waiting = await wait_elsewhere(there, "s", "second")
    assert (await here.client.delete("/sessions/s")).status_code == 200
    assert (await waiting).json()["code"] == "SESSION_NOT_FOUND"
    assert (await there.client.get("/sessions/s")).status_code == 404
    await read_events(own)


async def test_many_deletes_reach_turns_of_other_nodes(nodes: tuple[LocalNode, LocalNode]) -> None:
    """A bulk delete ends the turns of its sessions wherever they run."""
    here, there = nodes
    own, _ = await begin_turn(here, "s", STUCK)
    answer = await there.client.post("/sessions/batch-delete", json={"session_ids": ["s", "t"]})
    assert answer.json()["deleted"] == 1, answer.text
    last = (await read_events(own))[-1]
    assert (last["type"], last["reason"]) == ("turn.cancelled", "deleted")


async def test_a_choice_and_a_renewal_at_once_lose_nothing(
    nodes: tuple[LocalNode, LocalNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease that is just being taken is not called lost because the renewal does not find it yet."""
    here, _ = nodes
    await here.chat("s", "one")
    leases, ownership = here.runtime._store.leases, here.runtime._ownership
    assert leases is not None
    take = leases.take

    async def take_late(key: SessionKey, nonce: str) -> None:
        await ownership._renew()
        await take(key, nonce)
        await ownership._renew()

    monkeypatch.setattr(leases, "take", take_late)
    chosen = await here.chat("s", "two", params={"temperature": 0.5})
    assert chosen.status_code == 200, chosen.text
    assert await leases.holder(SessionKey("", "s")) is None


async def test_renewing_goes_on_while_announcing_fails(
    nodes: tuple[LocalNode, LocalNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn keeps its lease though its node cannot say that it is there."""
    here, there = nodes
    leases = here.runtime._store.leases
    assert leases is not None

    async def fail() -> None:
        raise StoreUnavailable

    monkeypatch.setattr(leases, "announce", fail)
    own, _ = await begin_turn(
        here, "s", '[[{"mode": "text", "text": "a b c d", "chunks": 4, "delay_s": 0.6}]]'
    )
    waiting = await wait_elsewhere(there, "s", "then")
    assert (await read_events(own))[-1]["type"] == "turn.finished"
    assert (await waiting).json()["turn_count"] == 2


async def test_a_silent_node_keeps_nobody_for_long(
    nodes: tuple[LocalNode, LocalNode], store: SharedMemoryStore
) -> None:
    """Who asks for a turn of a node that accepts connections and says nothing is told so in bounded time."""
    here, _ = nodes
    await here.chat("s", "one")
    with bind("127.0.0.1", 0) as silent:
        dead = Node("dead", url_of(silent))
        content, loop = store._content, asyncio.get_running_loop()
        turn_id = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"
        content.leases[SessionKey("", "s")] = Lease(Holder(dead, turn_id, is_turn=True), loop.time() + 60)
        content.nodes[dead] = loop.time() + LEASE_S
        began = loop.time()
        cancelled = await here.client.post("/sessions/s/cancel", json={})
        watched = await here.client.get(f"/sessions/s/turns/{turn_id}/stream")
        assert loop.time() - began < PROMPTLY_S
        for answer in (cancelled, watched):
            assert (answer.status_code, answer.json()["code"]) == (503, "NODE_UNREACHABLE")


async def test_what_is_no_node_is_not_believed(
    nodes: tuple[LocalNode, LocalNode], store: SharedMemoryStore
) -> None:
    """An address that is none, or another server's, gives an honest 503 and never somebody else's answer."""
    here, there = nodes
    await here.chat("s", "one")
    content, loop = store._content, asyncio.get_running_loop()
    for url in ("http://host:abc", there.private_url):
        liar = Node("another boot", url)
        turn_id = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"
        content.leases[SessionKey("", "s")] = Lease(Holder(liar, turn_id, is_turn=True), loop.time() + 60)
        content.nodes[liar] = loop.time() + 60
        for path in (f"/sessions/s/turns/{turn_id}/stream", "/agent-nodes"):
            answer = await here.client.get(path)
            assert answer.status_code == (200 if path == "/agent-nodes" else 503), answer.text
        del content.nodes[liar]


async def test_an_erasure_reaches_every_node(
    nodes: tuple[LocalNode, LocalNode], store: SharedMemoryStore
) -> None:
    """Turns that run and wait on another node end, its agents and its replays go, and none comes back."""
    here, there = nodes
    idle = SessionKey("", "idle")
    reply = (await there.chat("idle", "hello", user_id="u")).json()
    session = await store.find_session(idle)
    assert session is not None
    assert there.runtime.agents.is_live(idle)
    assert there.runtime._turns.find_log(session, reply["turn_id"]) is not None
    await there.client.post("/sessions", json={"session_id": "s", "user_id": "u"})
    running, _ = await begin_turn(there, "s", STUCK)
    waiting = asyncio.ensure_future(there.chat("s", "waiting", user_id="u"))
    await until(lambda: there.runtime.turns_in_flight == 2)
    answer = await here.client.delete("/users/u")
    assert answer.json()["erased"]["sessions"] == 2, answer.text
    last = (await read_events(running))[-1]
    assert (last["type"], last["reason"]) == ("turn.cancelled", "deleted")
    assert (await waiting).json()["code"] == "SESSION_NOT_FOUND"
    assert not there.runtime.agents.is_live(idle)
    assert there.runtime._turns.find_log(session, reply["turn_id"]) is None
    assert await store.list_keys(None, limit=9) == ()


async def test_an_erasure_does_not_begin_the_day_anew_on_another_node(model: ModelServer) -> None:
    """What the user had spent counts there, too; while it goes on no session of theirs is made there."""
    asked: list[httpx2.Response] = []

    class Asking(SharedMemoryStore):
        async def forget_user(self, owner: str, user_id: str) -> Erased:
            asked.append(await there.client.post("/sessions", json={"user_id": "u"}))
            return await super().forget_user(owner, user_id)

    store = Asking(LifeSpan(), lease_s=LEASE_S)
    async with (
        serve_node(store, model, user_tokens_per_day=5) as here,
        serve_node(store.beside(), model, user_tokens_per_day=5) as there,
    ):
        assert (await here.chat("s", "tell me a long story", user_id="u")).status_code == 200
        assert (await here.client.delete("/users/u")).json()["erased"]["usage_days"] == 1
        assert [(one.status_code, one.json()["code"]) for one in asked] == [(409, "SESSION_BUSY")]
        assert asked[0].headers["retry-after"]
        for node in (here, there):
            assert (await node.chat("s", "again", user_id="u")).json()["code"] == "RATE_LIMITED"
        assert (await there.client.post("/sessions", json={"user_id": "u"})).status_code == 201
