"""Canary secrets wherever one may be, requests of every outcome, an end by force: then none is anywhere."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.modelserver import ModelServer
from tests.serverprocess import ServerProcess

MARK = "c4n4ry"
"""In every canary, so that a part of one is found, too."""
KEY, OTHER_KEY, BASE_PASSWORD, TOOL_KEY = (
    f"{name}-{MARK}-0123456789abcdef" for name in ("sk-main", "other", "base", "tool")
)
RING = f"{MARK}{'A' * 37}="  # 32 bytes in base64
HEADERS = {
    "Authorization": f"Bearer {MARK}-bearer",
    "X-Api-Key": f"{MARK}-header",
    "Cookie": f"session={MARK}-cookie",
    "Proxy-Authorization": f"Basic {MARK}-proxy",
}
QUERY = f"api_key={MARK}-query&token={MARK}-token"
SECRETS = {"api_key": f"{MARK}-body", "nested": {"password": f"{MARK}-nested", "list": [{"authToken": MARK}]}}
TOOLS = '''
import os

def log_in(user: str) -> str:
    """Log in."""
    raise PermissionError(f"no login for {user} with {os.environ['TOOL_API_KEY']}")

async def leave(user: str) -> str:
    """End."""
    raise SystemExit(os.environ["TOOL_API_KEY"])
'''
ANSWERS: list[dict[str, Any]] = [
    *(
        {"mode": "status", "status": status, "code": "invalid_api_key"}
        for status in (400, 401, 403, 404, 422)
    ),
    {"mode": "status", "status": 429, "retry_after": "1"},
    {"mode": "status", "status": 500},
    {"mode": "error_event", "text": "begun"},
    {"mode": "raw", "data": f'data: {{"error": {{"message": "bad key {KEY}"}}}}\n\n'},
    {"mode": "raw", "data": f"data: not JSON {KEY}\n\n"},
    {"mode": "raw", "data": f'data: {{"choices": "{KEY}"}}\n\n'},
    {"mode": "html"},
    {"mode": "bad_json", "text": "begun"},
    {"mode": "rst", "text": "begun"},
    {"mode": "tools", "calls": [{"name": "log_in", "arguments": '{"user": "u"}', "id": "c1"}]},
    {"mode": "tools", "calls": [{"name": "leave", "arguments": '{"user": "u"}', "id": "c2"}]},
    {"mode": "tools", "calls": [{"name": "log_in", "arguments": '{"user": 7}', "id": "c3"}]},
    {"mode": "text", "text": "fine"},
]


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


def start(folder: Path, model: ModelServer, **settings: str) -> ServerProcess:
    """Return a server that is given canaries for all of its secrets."""
    (folder / "my_tools.py").write_text(TOOLS)
    tools = ["my_tools:log_in", "my_tools:leave"]
    agents = {"allowed_tools": tools, "agents": {"assistant": {"tools": tools}}}
    (folder / "agents.json").write_text(json.dumps(agents))
    with_login = model.base_url.replace("://", f"://me:{BASE_PASSWORD}@")
    other = {"base_url": with_login, "api_key_env": "OTHER_API_KEY", "models": {"scripted": {}}}
    return ServerProcess(
        folder,
        LOG_LEVEL="debug",
        AGENTS_FILE="agents.json",
        OPENAI_API_KEY=KEY,
        OPENAI_BASE_URL=model.base_url,
        OPENAI_MODEL="scripted",
        OTHER_API_KEY=OTHER_KEY,
        TOOL_API_KEY=TOOL_KEY,
        MODEL_PROVIDERS=json.dumps({"other": other}),
        JWT_SECRET=f"jwt-{MARK}-{'0' * 32}",
        PYTHONFAULTHANDLER="1",
        **settings,
    )


def drive(server: ServerProcess, model: ModelServer) -> str:
    """Send requests of every kind and outcome; return all that was answered."""
    told: list[str] = []

    def ask(method: str, path: str, body: Any = None) -> None:
        reply = server.request(method, path, body, HEADERS)
        told.append(f"{reply.status} {reply.headers} {reply.raw.decode(errors='replace')}")

    def watch(body: Any) -> None:
        events = server.stream("/chat/stream", body, headers=HEADERS)
        told.append(f"{events.status} {events.headers} {list(events)}")

    ask("POST", "/sessions", {"session_id": "s", "user_id": "u", "metadata": SECRETS, "state": SECRETS})
    ask("PATCH", "/sessions/s", {"metadata": {"deeper": SECRETS}})
    ask("PATCH", "/sessions/s/state", {"state": SECRETS})
    ask("PATCH", "/users/u/state", {"state": SECRETS})
    for number, answer in enumerate(ANSWERS):
        body = {"session_id": f"s{number}", "message": "hi", "user_id": "u", "metadata": SECRETS}
        model.script(answer)
        if number % 2:
            ask("POST", "/chat", body)
        else:
            watch(body)
        model.reset()
    for answer in (ANSWERS[1], ANSWERS[-1]):
        model.script(answer)
        ask("POST", "/chat", {"session_id": "other", "message": "hi", "provider": "other"})
        model.reset()
    ask("POST", "/sessions/other/checkpoints", {"label": "here", "data": SECRETS})
    wrong_bodies: list[Any] = [
        f'{{"message": "{MARK}"'.encode(),
        f'["{MARK}"]'.encode(),
        {"message": {"a": MARK}},
        {"message": "hi", "session_id": [MARK]},
        {"message": "hi", "unknown": MARK},
        {"message": "hi", "provider": MARK},
        {"message": "hi", "metadata": MARK},
    ]
    for body in wrong_bodies:
        ask("POST", "/chat", body)
    for path in ("/sessions", "/users/u/usage", "/agent-stats", "/health", "/nowhere", "/sessions/s"):
        ask("GET", f"{path}?{QUERY}")
    for path in (
        *("/agent-stats", "/agent-sessions", "/agent-health", "/health", "/ready", "/sessions", "/agents"),
        *("/models", "/sessions/stats", "/sessions/s?include=state", "/users/u/state", "/users/u/export"),
        *(f"/sessions/{name}/{what}" for name in ("other", *(f"s{n}" for n in range(len(ANSWERS))))
          for what in ("events", "turns", "history", "checkpoints")),
    ):  # fmt: skip
        ask("GET", path)
    return "\n".join(told)


def found_in_files(folder: Path) -> list[str]:
    """Return the server's files in which a canary is; its inputs are none of them."""
    files = [path for path in folder.iterdir() if path.name.startswith(("pool.db", "server.log"))]
    return [path.name for path in files if MARK.encode() in path.read_bytes()]


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("client", ["lean", "stock"])
def test_no_canary_is_anywhere(tmp_path: Path, model: ModelServer, log_format: str, client: str) -> None:
    """Not in logs, answers, events, the database or what an aborted process says, whatever went wrong."""
    keys = {"ENCRYPTION_KEYS": RING} if client == "stock" else {}
    with start(tmp_path, model, LOG_FORMAT=log_format, MODEL_CLIENT=client, **keys) as server:
        told = drive(server, model)
        server.stop(signal.SIGABRT)
        with closing(sqlite3.connect(tmp_path / "pool.db")) as database, database:
            database.execute("UPDATE sessions SET title = 'broken' WHERE session_id = 's'")
        server.start()
        broken = server.request("GET", "/sessions/s", headers=HEADERS)
        assert (broken.status, broken.body["code"]) == (500, "SNAPSHOT_UNREADABLE")
        told += broken.raw.decode()
        server.stop()
    log = server.log()
    assert "Aborted" in log
    assert "Traceback" in log or '"exc_type"' in log
    assert "PermissionError" in log
    assert "[redacted]" in log
    assert "[redacted]" in told
    assert [line for line in told.splitlines() if MARK in line] == []
    assert [line for line in log.splitlines() if MARK in line] == []
    assert found_in_files(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{MARK}-store@127.0.0.1:1/db",
        f"postgresql://user@127.0.0.1:1/db?password={MARK}",
        f"postgresql://user:{MARK}@[broken/db",
        f"redis://:{MARK}-store@127.0.0.1:1/0",
        f"redis+sentinel://:{MARK}@127.0.0.1:1/service/0",
        f"sqlite://{MARK}@nowhere",
        f"{MARK}://user:{MARK}@127.0.0.1/",
    ],
)
def test_a_start_that_fails_tells_no_password(tmp_path: Path, url: str) -> None:
    """The store cannot be reached, or its URL is none: the process ends and says why, without the URL."""
    command = [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--log-level", "debug"]
    environment = os.environ | {"STORE_URL": url, "MODEL_PROVIDER": "demo"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr
    assert MARK not in ended.stderr + ended.stdout


def test_what_ends_a_program_is_told_without_secrets(tmp_path: Path) -> None:
    """An error that nobody catches: of the program, of a thread, of a task, of a finalizer; and warnings."""
    program = f"""
import asyncio, gc, logging, threading, warnings
from app.telemetry.logs import configure_logs
secret = "{MARK}-0123"
configure_logs("console", "info", [secret])
def fail(where): raise ValueError(f"{{where}} with {{secret}}")
class Final:
    def __del__(self): fail("finalizer")
def thread(): fail("thread")
async def task(): fail("task")
async def main():
    running = asyncio.create_task(task())
    await asyncio.sleep(0)
    del running
    gc.collect()
worker = threading.Thread(target=thread); worker.start(); worker.join()
Final()
asyncio.run(main())
warnings.warn(f"warning with {{secret}}")
logging.getLogger("x").error("%d", secret)
fail("program")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    for where in ("thread", "finalizer", "task", "warning", "program"):
        assert f"{where} with [redacted]" in ended.stderr
    assert "could not be logged" in ended.stderr
    assert MARK not in ended.stderr.replace(f'"{MARK}-0123"', "")
