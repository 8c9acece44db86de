"""Credentials on real processes: the start, the keys' commands while it runs, and several workers."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.postgresserver import PostgresServer
from tests.serverprocess import ServerProcess

WITHIN_S = 10.0
JWT = {"AUTH_MODE": "jwt", "JWT_SECRET": "canary" * 6, "JWT_AUDIENCE": "a", "JWT_ISSUER": "i"}


def agentpool(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def make_key(folder: Path, user: str, *options: str, **settings: str) -> str:
    done = agentpool(folder, "keys", "create", "--user", user, *options, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < give_up_at, "it never happened"
        threading.Event().wait(0.05)


def status(server: ServerProcess, key: str, path: str = "/sessions") -> int:
    return server.request("GET", path, headers={"Authorization": f"Bearer {key}"}).status


def test_keys_come_and_go_while_it_serves(tmp_path: Path) -> None:
    """On an address that others reach: a key made now lets in, and one revoked now does not, unrestarted."""
    first = make_key(tmp_path, "alice")
    settings = {"AUTH_MODE": "api_key", "MODEL_PROVIDER": "demo", "HOST": "0.0.0.0"}
    with ServerProcess(tmp_path, **settings) as server:
        assert (status(server, first), status(server, "x")) == (200, 401)
        second = make_key(tmp_path, "root", "--scope", "admin", "--label", "ops", "--expires-days", "1")
        until(lambda: status(server, second, "/agent-stats") == 200)
        listed = agentpool(tmp_path, "keys", "list").stdout.splitlines()
        assert [line.split()[1:3] for line in listed] == [["alice", "user"], ["root", "admin"]]
        assert agentpool(tmp_path, "keys", "revoke", listed[0].split()[0]).returncode == 0
        until(lambda: status(server, first) == 401)
        assert status(server, second) == 200
        assert first not in server.log() + str(listed)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["keys", "create"], "--user"),
        (["keys", "create", "--user", "a/b"], "--user"),
        (["keys", "create", "--user", "a", "--scope", "root"], "--scope"),
        (["keys", "create", "--user", "a", "--expires-days", "0"], "--expires-days"),
        (["keys", "revoke", "none"], "no key of that id"),
    ],
)
def test_wrong_usage_is_said_in_one_line(tmp_path: Path, arguments: list[str], expected: str) -> None:
    """With the option's name, exit code 2, and nothing made."""
    done = agentpool(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "agentpool-keys.json").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"AUTH_MODE": "api_key"}, "API_KEYS_FILE"),
        ({"AUTH_MODE": "api_key", "API_KEYS_FILE": "/nonexistent/keys"}, "API_KEYS_FILE"),
        ({"AUTH_MODE": "api_key", "API_KEYS_FILE": "/dev/null"}, "API_KEYS_FILE"),
        (JWT | {"JWT_SECRET": "canary"}, "JWT_SECRET"),
        (JWT | {"JWT_JWKS_FILE": "x"}, "JWT_JWKS_FILE"),
        (JWT | {"JWT_SECRET": "", "JWT_JWKS_FILE": "/dev/null"}, "JWT_JWKS_FILE"),
        (JWT | {"JWT_AUDIENCE": ""}, "JWT_AUDIENCE"),
        ({"AUDIT_FILE": "/nonexistent/audit"}, "AUDIT_FILE"),
    ],
)
def test_a_door_that_cannot_work_stops_the_start(
    tmp_path: Path, settings: dict[str, str], expected: str
) -> None:
    """One line with the setting's name, no traceback and no secret; it never serves half closed."""
    ended = agentpool(tmp_path, "serve", "--port", "0", STORE_URL="memory://", **settings)
    assert ended.returncode in (1, 2)
    assert expected in ended.stderr
    assert "canary" not in ended.stderr + ended.stdout
    assert len(ended.stderr.strip().splitlines()) == 1


def test_workers_share_the_keys(tmp_path: Path, postgres: PostgresServer) -> None:
    """Each of two workers lets the same keys in, and knows of a revoked one; they reach each other."""
    alice, root = make_key(tmp_path, "alice"), make_key(tmp_path, "root", "--scope", "admin")
    with postgres.empty_schema() as url:
        settings = {"STORE_URL": url, "ACCEPT_VOLATILE": "true", "MODEL_PROVIDER": "demo"}
        with ServerProcess(tmp_path, "--workers", "2", AUTH_MODE="api_key", **settings) as server:
            mine, chief = ({"Authorization": f"Bearer {key}"} for key in (alice, root))

            def live_nodes() -> int:
                told = server.request("GET", "/agent-nodes", headers=chief)
                assert told.status == 200
                return sum(node["stats"] is not None for node in told.body["nodes"])

            until(lambda: live_nodes() == 2)
            for turns in range(1, 9):
                body = {"session_id": "s", "message": "hi"}
                assert server.request("POST", "/chat", body, mine).body["turn_count"] == turns
            agentpool(tmp_path, "keys", "revoke", alice[3:19])
            until(lambda: all(status(server, alice) == 401 for _ in range(20)))
