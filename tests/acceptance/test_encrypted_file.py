"""A server with ENCRYPTION_KEYS: what is in its files, and what it does without a key."""

import base64
import os
import subprocess
import sys
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest

from tests.serverprocess import ServerProcess

OLD, NEW = (base64.b64encode(letter * 32).decode() for letter in (b"o", b"n"))


class Markers:
    """Makes texts that are nowhere else, and remembers them."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def __call__(self, field: str) -> str:
        self.all.append(f"MARK-{field}-{token_hex(8)}")
        return self.all[-1]


def mark_everything(server: ServerProcess, mark: Markers) -> None:
    """Send a marker in every field that takes free text, on every way on which it is stored."""
    new = {
        "session_id": "s",
        "user_id": "u",
        "title": mark("title"),
        "metadata": {mark("key"): [mark("value")]},
        "state": {mark("state-key"): mark("state")},
        "params": {"stop": [mark("stop")]},
        "template": {"system_prompt": mark("prompt"), "context": {"x": mark("context")}},
    }
    assert send(server, "POST", "/sessions", new) == 201
    batch = {"sessions": [{"session_id": "b", "title": mark("batch-title")}]}
    assert send(server, "POST", "/sessions/batch", batch) == 200
    for number in range(3):
        said = {"session_id": "s", "message": f"My name is {mark('message')}, remember it."}
        assert send(server, "POST", "/chat", said) == 200, number
    for event in server.stream("/chat/stream", {"session_id": "s", "message": mark("streamed")}):
        assert "error" not in event.get("type", "")
    for method, path, body in (
        ("PATCH", "/sessions/s", {"title": mark("new-title"), "metadata": {"m": mark("patched")}}),
        ("PATCH", "/sessions/s/state", {"state": {"k": mark("session-state")}}),
        ("PATCH", "/users/u/state", {"state": {"k": mark("user-state")}}),
        ("PATCH", "/apps/default/state", {"state": {"k": mark("app-state")}}),
        ("POST", "/sessions/s/checkpoints", {"label": mark("label"), "data": {"d": mark("data")}}),
        ("POST", "/sessions/s/compact", {}),
        ("POST", "/sessions/s/fork", {"session_id": "f", "metadata": {"f": mark("fork")}}),
        ("POST", "/sessions/s/regenerate", {}),
        ("POST", "/sessions/s/rewind", {"turns": 1}),
        ("POST", "/chat", {"session_id": "s", "message": mark("after")}),
        ("POST", "/chat", {"session_id": "c", "message": "hello", "metadata": {"c": mark("chat")}}),
    ):
        assert send(server, method, path, body) in (200, 201), path


def send(server: ServerProcess, method: str, path: str, body: dict[str, Any]) -> int:
    return server.request(method, path, body).status


def found_in(folder: Path, texts: list[str]) -> set[str]:
    """Return which of the texts are in any file of the folder: database, WAL, log and all."""
    content = b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
    return {text for text in texts if text.encode() in content}


def test_no_marker_is_in_any_file(tmp_path: Path) -> None:
    """With a key no text of any field is in a file, while it serves and after ``kill -9``; nor is the key."""
    mark = Markers()
    with ServerProcess(tmp_path, ENCRYPTION_KEYS=NEW, MODEL_PROVIDER="demo", LOG_LEVEL="debug") as server:
        mark_everything(server, mark)
        secrets = [*mark.all, NEW, "nnnnnnnn"]
        assert found_in(tmp_path, secrets) == set()
        assert (tmp_path / "pool.db-wal").stat().st_size > 0
        server.kill()
        assert found_in(tmp_path, secrets) == set()
        server.start()
        shown = server.request("GET", "/sessions/s").body
        assert shown["title"] in mark.all
        found = server.request("GET", f"/sessions?q={shown['title'][5:20].upper()}").body
        assert {one["session_id"] for one in found["sessions"]} == {"s", "f"}  # a fork has its title
        assert found["total"] == 2
        assert server.request("GET", "/users/u/state").body["state"]["k"] in mark.all
        server.stop()
        assert found_in(tmp_path, secrets) == set()


def test_without_a_key_every_marker_is_there(tmp_path: Path) -> None:
    """The same scan finds all of them in a plain store: so each is sent, stored, and would be seen."""
    mark = Markers()
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        mark_everything(server, mark)
        server.stop()
        replaced = mark.all[0]  # a title; what is replaced may be overwritten in the file, too
        assert found_in(tmp_path, mark.all) | {replaced} == set(mark.all)


def test_a_missing_key_sets_its_sessions_aside(tmp_path: Path) -> None:
    """They are SNAPSHOT_UNREADABLE and unlisted, all else goes on; with the key they are back."""
    hidden = {"session_id": "hidden", "user_id": "u", "message": "My name is Alice"}
    with ServerProcess(tmp_path, ENCRYPTION_KEYS=OLD, MODEL_PROVIDER="demo") as server:
        assert send(server, "POST", "/chat", hidden) == 200
        server.request("PATCH", "/users/u/state", {"state": {"likes": "tea"}})
        server.stop()
        server.settings["ENCRYPTION_KEYS"] = NEW
        server.start()
        for refused in (
            server.request("GET", "/sessions/hidden"),
            server.request("GET", "/sessions/hidden/history"),
            server.request("POST", "/chat", hidden),
            server.request("POST", "/chat/stream", hidden),
            server.request("GET", "/users/u/state"),
        ):
            assert (refused.status, refused.body["code"]) == (500, "SNAPSHOT_UNREADABLE")
        assert send(server, "POST", "/chat", {"session_id": "well", "message": "hello"}) == 200
        listed = server.request("GET", "/sessions").body["sessions"]
        assert [one["session_id"] for one in listed] == ["well"]
        assert [server.request("GET", path).status for path in ("/health", "/ready")] == [200, 200]
        assert "Traceback" not in server.log()
        server.stop()
        server.settings["ENCRYPTION_KEYS"] = f"{NEW},{OLD}"
        server.start()
        asked = server.request("POST", "/chat", {"session_id": "hidden", "message": "What is my name?"})
        assert "Alice" in asked.body["reply"]
        assert server.request("GET", "/users/u/state").body["state"] == {"likes": "tea"}


@pytest.mark.parametrize(
    "keys",
    ["c2VjcmV0LWNhbmFyeQ==", "secret-canary, and more", f"{NEW},secret-canary", f"{NEW},{NEW}"],
    ids=["too short", "no base64", "the second", "twice"],
)
@pytest.mark.parametrize("command", ["serve", "rotate-keys"])
def test_wrong_keys_stop_the_start_in_one_line(tmp_path: Path, keys: str, command: str) -> None:
    """It names the setting and not its value, and nothing is made."""
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", command],
        cwd=tmp_path,
        env=os.environ | {"ENCRYPTION_KEYS": keys, "STORE_URL": f"sqlite:///{tmp_path}/pool.db"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert "ENCRYPTION_KEYS" in line
    assert not any(part.strip() in line for part in keys.split(","))
    assert not (tmp_path / "pool.db").exists()
