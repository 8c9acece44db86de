"""ENCRYPTION_KEYS with stores that are servers: their files, nodes that share them, and a move."""

import json
import subprocess
import sys
from collections.abc import Iterator
from os import environ
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.modelserver import ModelServer
from tests.postgresserver import PostgresServer
from tests.serverprocess import ServerProcess
from tests.storeserver import StoreServer

from .everything import live, reads
from .test_encrypted_file import NEW, OLD, Markers, mark_everything

PATIENCE_S = 120
PROFILE = {
    "allowed_tools": ["notebook:note"],
    "agents": {"scribe": {"system_prompt": "You take notes.", "tools": ["notebook:note"]}},
}


@pytest.fixture
def settings(store_server: StoreServer) -> dict[str, str]:
    """What makes a server use the store."""
    return {"STORE_URL": store_server.url, "ACCEPT_VOLATILE": "true", "LOG_LEVEL": "debug"}


@pytest.fixture
def empty(store_server: StoreServer) -> Iterator[StoreServer]:
    """The store, with nothing in it but what the test puts there."""
    clear(store_server)
    yield store_server
    clear(store_server)


def clear(server: StoreServer) -> None:
    if isinstance(server, PostgresServer):
        server.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    else:
        server.command("FLUSHALL")  # type: ignore[attr-defined]


def found_in(server: StoreServer, texts: list[str]) -> set[str]:
    """Return which of the texts are in any file of the store's server: tables, logs of writes, and all."""
    server.stop()
    files = [path for path in server.data_folder.rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    server.start()
    return {text for text in texts if text.encode() in content}


def mark_tools(folder: Path, mark: Markers, **settings: str) -> None:
    """Have a model reason, call a tool, answer, and fail, with a marker in whatever it says."""
    result, reasoning = mark("result"), mark("reasoning")
    (folder / "notebook.py").write_text(
        f'async def note(text: str) -> str:\n    """Note it."""\n    return "{result} " + text[:0]\n'
    )
    (folder / "agents.json").write_text(json.dumps(PROFILE))
    call = {"name": "note", "arguments": json.dumps({"text": mark("argument")}), "id": "c1"}
    steps = [
        {"mode": "tools", "calls": [call], "say": mark("said-before")},
        {"mode": "reasoning", "reasoning": reasoning, "text": mark("reply")},
        {"mode": "status", "status": 400},
    ]
    with ModelServer() as model:
        model.script(*steps)
        settings |= {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": model.base_url, "OPENAI_MODEL": "m"}
        with ServerProcess(folder, AGENTS_FILE="agents.json", **settings) as server:
            for status in (200, 502):
                said = {"session_id": "tools", "agent_id": "scribe", "message": mark(f"asked-{status}")}
                assert server.request("POST", "/chat", said).status == status


@pytest.mark.parametrize("keys", [NEW, ""], ids=["with a key", "without"])
def test_no_marker_is_in_the_files_of_the_server(
    empty: StoreServer, tmp_path: Path, settings: dict[str, str], keys: str
) -> None:
    """With a key no text of any field is found, nor the key; without one the same scan finds all."""
    settings |= {"ENCRYPTION_KEYS": keys} if keys else {}
    mark = Markers()
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo", **settings) as server:
        mark_everything(server, mark)
    mark_tools(tmp_path, mark, **settings)
    assert found_in(empty, [*mark.all, NEW, "nnnnnnnn"]) == (set() if keys else set(mark.all))


@pytest.mark.parametrize("rings", [(NEW, NEW), (f"{NEW},{OLD}", f"{OLD},{NEW}")], ids=["same", "rotating"])
def test_nodes_share_what_is_encrypted(
    empty: StoreServer, tmp_path: Path, settings: dict[str, str], rings: tuple[str, str]
) -> None:
    """Two nodes go on with each other's sessions, also while only one of them writes with the new key."""
    cluster = Cluster(tmp_path, [empty.url] * 2)
    for node, keys in zip(cluster.nodes, rings, strict=True):
        node.settings["ENCRYPTION_KEYS"] = keys
    with cluster:
        said = ["My name is Alice", "hello", "What is my name?", "bye"]
        for number, text in enumerate(said):
            node = cluster.nodes[number % 2]
            body = {"session_id": "s", "user_id": "u", "message": text}
            reply = node.request("POST", "/chat", body, {"Idempotency-Key": f"k{number}"})
            assert reply.status == 200
            assert node.request("PATCH", "/users/u/state", {"state": {f"n{number}": number}}).status == 200
            repeated = cluster.nodes[1 - number % 2].request(
                "POST", "/chat", body, {"Idempotency-Key": f"k{number}"}
            )
            assert repeated.body["turn_id"] == reply.body["turn_id"]
        assert cluster.history("s", 0) == cluster.history("s", 1)
        assert "Alice" in cluster.history("s")[5]["content"]
        states = [node.request("GET", "/users/u/state").body["state"] for node in cluster.nodes]
        assert states == [{f"n{number}": number for number in range(4)}] * 2
        cluster.kill(0)
        body = {"session_id": "s", "user_id": "u", "message": "still there?"}
        assert cluster.nodes[1].request("POST", "/chat", body).status == 200


def test_a_plain_store_moves_into_an_encrypted_one(
    empty: StoreServer, tmp_path: Path, settings: dict[str, str]
) -> None:
    """Nobody notices, and nothing that is readable is written on the way."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        keyed = live(server)
        answers = [server.request(*request).body for request in keyed]
        # As after a start: no agent is live, which sessions would show.
        server.request("POST", "/agent-cleanup", {"mode": "oldest", "count": 99})
        before = reads(server)
        plain = server.settings["STORE_URL"]
        server.stop()
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", "migrate-store", plain, empty.url],
            cwd=tmp_path,
            env=environ | settings | {"ENCRYPTION_KEYS": OLD, "LOG_LEVEL": "error"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert (done.returncode, done.stderr, done.stdout.splitlines()[-1]) == (0, "", "verified")
        assert found_in(empty, ["Alice"]) == set()
        server.settings |= settings | {"ENCRYPTION_KEYS": OLD}
        server.start()
        assert reads(server) == before
        assert [server.request(*request).body for request in keyed] == answers
        asked = server.request("POST", "/chat", {"session_id": "a", "message": "What is my name?"}).body
        assert "Alice" in asked["reply"]


def test_a_missing_key_sets_its_sessions_aside(
    empty: StoreServer, tmp_path: Path, settings: dict[str, str]
) -> None:
    """They are SNAPSHOT_UNREADABLE and unlisted, all else goes on; with the key they are back."""
    hidden = {"session_id": "hidden", "message": "My name is Alice"}
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo", **settings, ENCRYPTION_KEYS=OLD) as server:
        assert server.request("POST", "/chat", hidden).status == 200
        server.stop()
        server.settings["ENCRYPTION_KEYS"] = NEW
        server.start()
        for refused in (
            server.request("GET", "/sessions/hidden"),
            server.request("GET", "/sessions/hidden/history"),
            server.request("POST", "/chat", hidden),
        ):
            assert (refused.status, refused.body["code"]) == (500, "SNAPSHOT_UNREADABLE")
        assert server.request("POST", "/chat", {"session_id": "well", "message": "hello"}).status == 200
        listed = server.request("GET", "/sessions").body["sessions"]
        assert [one["session_id"] for one in listed] == ["well"]
        assert [server.request("GET", path).status for path in ("/health", "/ready")] == [200, 200]
        assert "Traceback" not in server.log()
        server.stop()
        server.settings["ENCRYPTION_KEYS"] = f"{NEW},{OLD}"
        server.start()
        asked = server.request("POST", "/chat", {"session_id": "hidden", "message": "What is my name?"})
        assert "Alice" in asked.body["reply"]
