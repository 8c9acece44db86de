"""``agentpool rotate-keys`` as an operator uses it: stop, rotate, start with the new key alone."""

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import apsw
import pytest

from tests.acceptance.everything import live, reads
from tests.serverprocess import ServerProcess

SESSIONS = 1500
TURNS = 40  # so many that their average would tell of sessions that are counted twice
KILLED_AT = (1, 700, SESSIONS)
"""When a rotation is killed: with so many sessions done. After the last the file is written anew."""
POLL_S = 0.002
SOON_S = 60
PATIENCE_S = 120
FIRST, SECOND = (base64.b64encode(letter * 32).decode() for letter in (b"1", b"2"))


def rotating(server: ServerProcess, keys: str, *flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "rotate-keys", *flags],
        cwd=server.folder,
        env=os.environ | server.settings | {"ENCRYPTION_KEYS": keys},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rotate(server: ServerProcess, keys: str, *flags: str) -> tuple[int, list[str], list[str]]:
    """Return the exit code, and the lines on standard output and on standard error."""
    with rotating(server, keys, *flags) as process:
        said, complained = process.communicate(timeout=PATIENCE_S)
    return process.returncode, said.splitlines(), complained.splitlines()


def is_anywhere(folder: Path, text: str) -> bool:
    return any(text.encode() in file.read_bytes() for file in folder.glob("pool.db*"))


@pytest.fixture(params=["sqlite", "postgres", "redis"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The settings that name an empty store of each kind; the tests' servers are volatile."""
    if request.param == "sqlite":
        yield {}
        return
    monkeypatch.setenv("ACCEPT_VOLATILE", "true")
    monkeypatch.setenv("LOG_LEVEL", "error")  # no warning that it is
    if request.param == "postgres":
        with request.getfixturevalue("postgres").empty_schema() as url:
            yield {"STORE_URL": url}
    else:
        redis = request.getfixturevalue("redis_server")
        redis.command("FLUSHALL")
        yield {"STORE_URL": redis.url}


def test_nobody_notices_a_rotation(tmp_path: Path, store: dict[str, str]) -> None:
    """From no key to the first, and to the second: every read and keyed answer stays."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo", **store) as server:
        keyed = live(server)
        answers = [server.request(*request).body for request in keyed]
        # As after a start: no agent is live, which sessions would show.
        server.request("POST", "/agent-cleanup", {"mode": "oldest", "count": 99})
        before = reads(server)
        server.stop()
        assert store or is_anywhere(tmp_path, "Alice")
        for ring, kept in ((FIRST, FIRST), (f"{SECOND},{FIRST}", SECOND)):
            code, said, complained = rotate(server, ring)
            assert (code, complained) == (0, [])
            assert said[0].startswith("3 sessions, ")
            assert said[1:] == ["encrypted with the first key"]
            assert not is_anywhere(tmp_path, "Alice")
            server.settings["ENCRYPTION_KEYS"] = kept
            server.start()
            assert reads(server) == before
            server.stop()
        server.start()
        assert [server.request(*request).body for request in keyed] == answers
        asked = server.request("POST", "/chat", {"session_id": "a", "message": "What is my name?"}).body
        assert "Alice" in asked["reply"]


def test_a_rotation_that_was_killed_is_repeated(tmp_path: Path) -> None:
    """After ``kill -9`` at any moment the ring reads all; a repeat makes the old key needless."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo", ENCRYPTION_KEYS=FIRST) as server:
        for start in range(0, SESSIONS, 500):
            numbers = range(start, start + 500)
            batch = [{"session_id": f"s{n}", "user_id": "u", "metadata": {"number": n}} for n in numbers]
            assert server.request("POST", "/sessions/batch", {"sessions": batch}).status == 200
        for _ in range(TURNS):
            server.request("POST", "/chat", {"session_id": "s7", "message": "hello"})
        server.request("PATCH", "/users/u/state", {"state": {"likes": "tea"}})
        history = server.request("GET", "/sessions/s7/history").body
        stats = server.request("GET", "/sessions/stats").body
        server.stop()
        ring = f"{SECOND},{FIRST}"
        for least in KILLED_AT:
            process = rotating(server, ring)
            until_rotated(tmp_path / "pool.db", least, process)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            server.settings["ENCRYPTION_KEYS"] = ring
            server.start()
            assert server.request("GET", "/sessions/s7/history").body == history
            assert server.request("GET", f"/sessions/s{SESSIONS - 1}").status == 200
            assert server.request("GET", "/users/u/state").body["state"] == {"likes": "tea"}
            server.stop()
            # As if nothing were done, so that the next is killed at its own moment.
            server.settings["ENCRYPTION_KEYS"] = f"{FIRST},{SECOND}"
            if least != KILLED_AT[-1]:
                assert rotate(server, f"{FIRST},{SECOND}")[0] == 0
        assert rotate(server, ring)[0] == 0
        server.settings["ENCRYPTION_KEYS"] = SECOND
        server.start()
        listed = server.request("GET", "/sessions?limit=1").body
        assert listed["total"] == SESSIONS
        assert server.request("GET", "/sessions/s7/history").body == history
        assert server.request("GET", "/sessions/stats").body == stats
        for number in (0, SESSIONS // 2, SESSIONS - 1):
            assert server.request("GET", f"/sessions/s{number}").body["metadata"] == {"number": number}


def until_rotated(path: Path, least: int, process: "subprocess.Popen[str]") -> None:
    """Wait until so many sessions are encrypted with the second key; it must not have ended before."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(1000)
    (old,) = {raw for (raw,) in connection.execute("SELECT DISTINCT substr(title, 1, 5) FROM sessions")}
    give_up_at = time.monotonic() + SOON_S
    try:
        while time.monotonic() < give_up_at:
            query = "SELECT count(*) FROM sessions WHERE substr(title, 1, 5) != ?"
            if connection.execute(query, (old,)).get >= least:
                return
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
                break
    finally:
        connection.close()
    raise AssertionError(f"too little was done, or it ended too early: {process.returncode}")


def test_a_store_in_use_is_left_alone(tmp_path: Path) -> None:
    """While a server has it: one line that says so, and the server goes on."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        server.request("POST", "/chat", {"session_id": "a", "message": "hello"})
        code, said, (line,) = rotate(server, FIRST)
        assert (code, said) == (1, [])
        assert line.startswith("agentpool: STORE_URL: ")
        assert f"in use by process {server.pid}" in line
        assert server.request("GET", "/sessions/a").status == 200


@pytest.mark.parametrize(("flags", "code"), [([], 1), (["--skip-broken"], 0)])
def test_what_cannot_be_read_is_named_and_left_alone(tmp_path: Path, flags: list[str], code: int) -> None:
    """A session whose key is missing stays as it is, and is readable again where its key is."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo", ENCRYPTION_KEYS=FIRST) as server:
        server.request("POST", "/chat", {"session_id": "hit", "message": "hello"})
        server.stop()
        server.settings["ENCRYPTION_KEYS"] = ""
        server.start()
        server.request("POST", "/chat", {"session_id": "well", "message": "hello"})
        server.stop()
        done, said, complained = rotate(server, SECOND, *flags)
        assert done == code
        assert complained == ["agentpool: session 'hit' cannot be read and is left as it is"]
        assert said[-1] == "encrypted with the first key, but for what cannot be read"
        server.settings["ENCRYPTION_KEYS"] = f"{SECOND},{FIRST}"
        server.start()
        for session_id in ("hit", "well"):
            assert server.request("GET", f"/sessions/{session_id}/history").body["messages"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ENCRYPTION_KEYS": ""}, "ENCRYPTION_KEYS is not set"),
        ({"STORE_URL": "memory://"}, "STORE_URL: memory:// keeps nothing"),
        ({"STORE_URL": "sqlite:///missing.db"}, "STORE_URL: there is no such file"),
    ],
)
def test_wrong_usage_touches_nothing(tmp_path: Path, settings: dict[str, str], expected: str) -> None:
    """Exit code 2 with one line that says what is wrong, and no file is made."""
    server = ServerProcess(tmp_path, **settings)
    code, said, (line,) = rotate(server, settings.get("ENCRYPTION_KEYS", FIRST))
    assert (code, said) == (2, [])
    assert expected in line
    assert list(tmp_path.glob("*.db")) == []
