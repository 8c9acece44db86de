"""``agentpool migrate-store`` as an operator uses it: stop, move, start, and nobody notices."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import apsw
import pytest

from app.domain.session import LifeSpan
from app.stores.opening import Sharing, open_store
from tests.acceptance.everything import live, reads
from tests.serverprocess import ServerProcess

SESSIONS = 1500
POLL_S = 0.02
SOON_S = 60
PATIENCE_S = 120


@dataclass(frozen=True)
class Target:
    """An empty store to move to; ``count`` says how many sessions another process has stored there so far."""

    url: str
    count: Callable[[], int]


def sqlite_target(request: pytest.FixtureRequest) -> Iterator[Target]:
    path = request.getfixturevalue("tmp_path") / "moved.db"

    def count() -> int:
        try:
            connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        except apsw.CantOpenError:
            return 0
        try:
            return int(connection.execute("SELECT count(*) FROM sessions").get)
        except (apsw.SQLError, apsw.BusyError):
            return 0  # no table yet
        finally:
            connection.close()

    yield Target(f"sqlite:///{path}", count)


def postgres_target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with request.getfixturevalue("postgres").empty_schema() as url:
        yield shared_target(request, url)


def redis_target(request: pytest.FixtureRequest) -> Iterator[Target]:
    server = request.getfixturevalue("redis_server")
    server.command("FLUSHALL")
    yield shared_target(request, server.url)


def shared_target(request: pytest.FixtureRequest, url: str) -> Target:
    """Return a store that the test may look into while others use it; the tests' servers are volatile."""
    environment = request.getfixturevalue("monkeypatch")
    environment.setenv("ACCEPT_VOLATILE", "true")
    environment.setenv("LOG_LEVEL", "error")  # no warning that it is

    async def count() -> int:
        store = open_store(url, LifeSpan(), sharing=Sharing(accept_volatile=True))
        await store.open("who counts")
        try:
            return len(await store.list_after(None, 2 * SESSIONS))
        finally:
            await store.close()

    return Target(url, lambda: asyncio.run(count()))


SHARED = {"postgres": postgres_target, "redis": redis_target}
TARGETS = {"sqlite": sqlite_target} | SHARED


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    yield from TARGETS[request.param](request)


@pytest.fixture(params=SHARED)
def shared(request: pytest.FixtureRequest) -> Iterator[Target]:
    """An empty store that several processes can have open."""
    yield from SHARED[request.param](request)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "app.cli", "migrate-store", *arguments]


def migrate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env=os.environ, capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_nobody_notices_a_move(tmp_path, target):
    """Every read says the same on the copy, keys answer as before, and the conversation goes on."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        keyed = live(server)
        answers = [server.request(*request).body for request in keyed]
        # As after a start: no agent is live, which sessions would show.
        server.request("POST", "/agent-cleanup", {"mode": "oldest", "count": 99})
        before = reads(server)
        source_url = server.settings["STORE_URL"]
        server.stop()
        done = migrate(tmp_path, source_url, target.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[0].startswith("3 sessions, ")
        assert done.stdout.splitlines()[-1] == "verified"
        server.settings["STORE_URL"] = target.url
        server.start()
        assert reads(server) == before
        assert [server.request(*request).body for request in keyed] == answers
        asked = server.request("POST", "/chat", {"session_id": "a", "message": "What is my name?"}).body
        assert "Alice" in asked["reply"]
        assert asked["activation"] == "restored"


def test_a_move_that_was_killed_is_repeated(tmp_path, target):
    """After ``kill -9`` in the middle a repeat completes the copy; every session is there, once."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        source_url = server.settings["STORE_URL"]
        for start in range(0, SESSIONS, 500):
            batch = [
                {"session_id": f"s{number}", "user_id": "u", "metadata": {"number": number}}
                for number in range(start, start + 500)
            ]
            assert server.request("POST", "/sessions/batch", {"sessions": batch}).status == 200
        server.request("POST", "/chat", {"session_id": "s7", "message": "hello"})
        before = server.request("GET", "/sessions/s7/history").body
        server.stop()
        began = subprocess.Popen(
            command(source_url, target.url), cwd=tmp_path, env=os.environ, stderr=subprocess.DEVNULL
        )
        until_some(target, began)
        began.kill()
        assert began.wait(SOON_S) == -signal.SIGKILL
        assert 0 < target.count() < SESSIONS
        done = migrate(tmp_path, source_url, target.url)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "verified")
        server.settings["STORE_URL"] = target.url
        server.start()
        assert server.request("GET", "/health").body["session_count"] == SESSIONS
        assert server.request("GET", "/sessions/s7/history").body == before
        assert server.request("GET", f"/sessions/s{SESSIONS - 1}").body["metadata"] == {
            "number": SESSIONS - 1
        }


def until_some(target: Target, process: "subprocess.Popen[bytes]") -> None:
    """Wait until some sessions are stored; the process must not have ended before."""
    give_up_at = time.monotonic() + SOON_S
    while time.monotonic() < give_up_at:
        if target.count():
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            break
    raise AssertionError(f"nothing was copied, or the copy ended too early: {process.returncode}")


def test_a_store_in_use_is_not_moved(tmp_path, target):
    """While a server has it: one line that says so, as source and as target, and the server goes on."""
    other = f"sqlite:///{tmp_path}/other.db"
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        server.request("POST", "/chat", {"session_id": "a", "message": "hello"})
        url = server.settings["STORE_URL"]
        first = migrate(tmp_path, url, target.url)
        with ServerProcess(tmp_path, STORE_URL=other, MODEL_PROVIDER="demo"):
            pass
        second = migrate(tmp_path, other, url)
        for done, name in ((first, "FROM"), (second, "TO")):
            assert (done.returncode, done.stdout) == (1, "")
            (line,) = done.stderr.splitlines()
            assert line.startswith(f"agentpool: {name}: ")
            assert f"in use by process {server.pid}" in line
        assert server.request("GET", "/sessions/a").status == 200


def test_a_shared_store_in_use_is_not_moved(tmp_path, shared):
    """While a server has announced itself: one line without the URL; when it has stopped, it is moved."""
    there = f"sqlite:///{tmp_path}/there.db"
    with ServerProcess(tmp_path, STORE_URL=shared.url, MODEL_PROVIDER="demo") as server:
        answer = server.request("POST", "/chat", {"session_id": "a", "message": "hello"}).body
        refused = migrate(tmp_path, shared.url, there)
        assert (refused.returncode, refused.stdout) == (1, "")
        (line,) = refused.stderr.splitlines()
        assert line.startswith("agentpool: FROM: 1 server(s) use it")
        assert "://" not in line
        server.stop()
        done = migrate(tmp_path, shared.url, there)
        assert (done.returncode, done.stderr) == (0, "")
        server.settings["STORE_URL"] = there
        server.start()
        history = server.request("GET", "/sessions/a/history").body["messages"]
        assert history[-1]["content"] == answer["reply"]


def test_a_target_with_other_sessions_stays_as_it_is(tmp_path, target):
    """What the source has not is not destroyed: one line, exit code 1."""
    urls = [f"sqlite:///{tmp_path}/one.db", target.url]
    for number, url in enumerate(urls):
        with ServerProcess(tmp_path, STORE_URL=url, MODEL_PROVIDER="demo") as server:
            assert server.request("POST", "/sessions", {"session_id": f"s{number}"}).status == 201
    done = migrate(tmp_path, *urls)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "TO: it has session 's1', which the source has not" in line
    with ServerProcess(tmp_path, STORE_URL=target.url, MODEL_PROVIDER="demo") as server:
        assert [one["session_id"] for one in server.request("GET", "/sessions").body["sessions"]] == ["s1"]


@pytest.mark.parametrize(("flags", "code"), [([], 1), (["--skip-broken"], 0)])
def test_broken_sessions_stay_behind(tmp_path, target, flags, code):
    """They are named and make the exit code 1 unless that was allowed; all others are copied and verified."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        url = server.settings["STORE_URL"]
        for session_id in ("hit", "well"):
            server.request("POST", "/chat", {"session_id": session_id, "message": "hello"})
    connection = apsw.Connection(str(tmp_path / "pool.db"))
    connection.execute("UPDATE turns SET depth = 7 WHERE session = 1")
    connection.close()
    done = migrate(tmp_path, *flags, url, target.url)
    assert done.returncode == code
    assert done.stderr.splitlines() == ["agentpool: session 'hit' cannot be read and is not copied"]
    assert done.stdout.splitlines()[-1] == "verified; unreadable: 1"
    with ServerProcess(tmp_path, STORE_URL=target.url, MODEL_PROVIDER="demo") as server:
        assert server.request("GET", "/sessions/well/history").body["messages"]
        assert server.request("GET", "/sessions/hit").status == 404


def test_a_terminal_shows_a_bar(tmp_path, target):
    """Where standard error is a terminal, it shows how many of how many sessions are copied."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        server.request("POST", "/sessions/batch", {"sessions": [{"session_id": f"s{n}"} for n in range(20)]})
    ours, theirs = os.openpty()
    with subprocess.Popen(
        command(server.settings["STORE_URL"], target.url),
        cwd=tmp_path,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # how a terminal whose other side is closed ends
            while part := os.read(ours, 4096):
                shown += part
        said, _ = process.communicate(timeout=PATIENCE_S)
    os.close(ours)
    assert (process.returncode, said.splitlines()[-1]) == (0, b"verified")
    assert b"20/20" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sqlite:///a.db"], "Missing argument"),
        (["mysql://u:canary@h/x", "sqlite:///b.db"], "FROM: The store URL must be"),
        (["sqlite:///there.db", "mysql://u:canary@h/x"], "TO: The store URL must be"),
        (["memory://", "sqlite:///b.db"], "FROM: memory:// keeps nothing"),
        (["sqlite:///there.db", "memory://"], "TO: memory:// keeps nothing"),
        (["sqlite:///missing.db", "sqlite:///b.db"], "FROM: there is no such file"),
        (["sqlite:///there.db", "sqlite:///./there.db"], "FROM and TO are the same store"),
    ],
)
def test_wrong_usage_touches_nothing(tmp_path, arguments, expected):
    """Exit code 2 with one line that says what is wrong, without a password, and no file is made."""
    (tmp_path / "there.db").touch()
    done = migrate(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert "canary" not in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there.db"]
    assert (tmp_path / "there.db").read_bytes() == b""
