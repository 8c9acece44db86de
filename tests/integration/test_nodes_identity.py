"""Two nodes that ask for credentials: what one passes on to the other counts there as the client's own."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.domain.session import LifeSpan
from app.identity.followed import LOOK_EVERY_S
from app.identity.key_file import KeyFile
from app.runtime import SystemClock
from app.stores.memory.shared import SharedMemoryStore
from tests.integration.test_two_nodes import LEASE_S, SLOW, STUCK, LocalNode, serve_node
from tests.modelserver import ModelServer
from tests.people import bearer, make_keys

Nodes = tuple[LocalNode, LocalNode]


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return make_keys(tmp_path)[1]


@pytest.fixture
async def nodes(tmp_path: Path, keys: dict[str, str]) -> AsyncIterator[Nodes]:
    store = SharedMemoryStore(LifeSpan(), lease_s=LEASE_S)
    asking = {"auth_mode": "api_key", "api_keys_file": str(tmp_path / "keys.json")}
    with ModelServer() as model:
        async with AsyncExitStack() as stack:
            made = [
                await stack.enter_async_context(
                    serve_node(each, model, **asking, audit_file=str(tmp_path / f"audit-{name}.jsonl"))
                )
                for name, each in (("a", store), ("b", store.beside()))
            ]
            yield made[0], made[1]


async def begin(node: LocalNode, key: str, message: str) -> tuple[httpx2.Response, str]:
    body = {"session_id": "s", "message": message}
    request = node.client.build_request("POST", "/chat/stream", json=body, headers=bearer(key))
    response = await node.client.send(request, stream=True)
    assert response.status_code == 200, await response.aread()
    return response, response.headers["x-turn-id"]


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_turn_of_another_node_is_its_owners(nodes: Nodes, keys: dict[str, str]) -> None:
    """The owner watches it from the other node; another user and nobody do not, as on the same node."""
    here, there = nodes
    running, turn_id = await begin(here, keys["alice"], SLOW)
    path = f"/sessions/s/turns/{turn_id}/stream"
    watched = await there.client.get(path, headers=bearer(keys["alice"]))
    assert watched.status_code == 200
    assert "turn.finished" in watched.text
    assert (await there.client.get(path, headers=bearer(keys["bobby"]))).status_code == 404
    assert (await there.client.get(path)).status_code == 401
    await running.aclose()


async def test_nodes_ask_each_other_without_a_credential(nodes: Nodes, keys: dict[str, str]) -> None:
    """Turns and counters of the other node are there; nobody else gets at what only nodes may ask."""
    here, there = nodes
    running, turn_id = await begin(here, keys["alice"], STUCK)
    active = await there.client.get("/sessions/s/turns/active", headers=bearer(keys["alice"]))
    assert active.json()["turn_id"] == turn_id
    told = (await there.client.get("/agent-nodes", headers=bearer(keys["chief"]))).json()["nodes"]
    assert [node["stats"]["active_agents"] for node in told] == [0, 1]
    question = {"owner": "alice", "session_id": "s"}
    for who, status in ((None, 401), ("bobby", 404), ("chief", 404)):
        headers = {} if who is None else bearer(keys[who])
        for path in ("/node/turns", "/node/live", "/node/cancel"):
            assert (await there.client.post(path, json=question, headers=headers)).status_code == status
    forged = {"X-AgentPool-Hops": "0", "X-AgentPool-Node": "0" * 64}
    assert (await there.client.get("/agent-stats", headers=forged)).status_code == 401
    cancelled = await there.client.post("/sessions/s/cancel", headers=bearer(keys["alice"]))
    assert cancelled.json()["turn_id"] == turn_id
    await running.aclose()


async def test_a_revoked_key_counts_on_no_node(tmp_path: Path, nodes: Nodes, keys: dict[str, str]) -> None:
    """Nor does a request that a node passes on with it."""
    here, there = nodes
    running, turn_id = await begin(here, keys["alice"], STUCK)
    KeyFile(str(tmp_path / "keys.json")).revoke(keys["alice"][3:19])
    clock = SystemClock()
    give_up_at = clock.monotonic() + 4 * LOOK_EVERY_S
    for node in nodes:
        while (await node.client.get("/sessions", headers=bearer(keys["alice"]))).status_code != 401:
            assert clock.monotonic() < give_up_at
    path = f"/sessions/s/turns/{turn_id}/stream"
    assert (await there.client.get(path, headers=bearer(keys["alice"]))).status_code == 401
    named = await there.client.post("/sessions/s/cancel?user_id=alice", headers=bearer(keys["chief"]))
    assert named.status_code == 202
    await running.aclose()


async def test_the_node_that_does_it_has_it_in_its_audit_log(
    tmp_path: Path, nodes: Nodes, keys: dict[str, str]
) -> None:
    """One line for a change that one node passes on to another, where it was carried out."""
    here, there = nodes
    running, _ = await begin(here, keys["alice"], SLOW)
    await running.aread()
    dropped = await there.client.delete("/agent-sessions/s?user_id=alice", headers=bearer(keys["chief"]))
    assert dropped.status_code == 200, dropped.text
    (line,) = lines_of(tmp_path / "audit-a.jsonl")
    assert (line["action"], line["owner"], line["status"]) == (
        "DELETE /agent-sessions/{session_id}",
        "alice",
        200,
    )
    assert line["request_id"] == dropped.headers["x-request-id"]
    assert lines_of(tmp_path / "audit-b.jsonl") == []
