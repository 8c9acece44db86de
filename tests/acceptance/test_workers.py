"""``--workers``: several processes on one socket, over one PostgreSQL."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.postgresserver import PostgresServer
from tests.serverprocess import ServerProcess

SOON_S = 40.0  # a worker takes a second to start; with all the other tests' processes, some

T = TypeVar("T")


@pytest.fixture
def workers(tmp_path: Path, postgres: PostgresServer) -> Iterator[ServerProcess]:
    with postgres.empty_schema() as url:
        settings = {"STORE_URL": url, "ACCEPT_VOLATILE": "true", "LEASE_S": "2", "MODEL_PROVIDER": "demo"}
        with ServerProcess(tmp_path, "--workers", "2", **settings) as server:
            yield server


def until(condition: Callable[[], T]) -> T:
    give_up_at = time.monotonic() + SOON_S
    while not (answer := condition()):
        assert time.monotonic() < give_up_at, "it never happened"
        threading.Event().wait(0.05)
    return answer


def children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def nodes_of(server: ServerProcess) -> set[str]:
    return {node["node"] for node in server.request("GET", "/agent-nodes").body["nodes"]}


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def chat(server: ServerProcess, session_id: str, message: str = "hi") -> int:
    reply = server.request("POST", "/chat", {"session_id": session_id, "message": message})
    assert reply.status == 200, reply.raw
    return reply.body["turn_count"]


def test_workers_share_what_they_serve(workers: ServerProcess) -> None:
    """Each of them serves while the other cannot, and goes on with the conversation that the other had."""
    until(lambda: len(nodes_of(workers)) == 2)
    # Which of two idle processes the kernel hands a connection to is its own affair.
    for turns, halted in enumerate(sorted(children_of(workers.pid)), start=1):
        os.kill(halted, signal.SIGSTOP)
        try:
            assert chat(workers, "s") == turns
        finally:
            os.kill(halted, signal.SIGCONT)
    assert [chat(workers, "s") for _ in range(20)] == list(range(3, 23))


def test_a_worker_that_dies_is_replaced(workers: ServerProcess) -> None:
    """After ``kill -9`` of one the other serves, and soon two do again; nothing acknowledged is lost."""
    assert chat(workers, "s") == 1
    victim = next(iter(children_of(workers.pid)))
    os.kill(victim, signal.SIGKILL)
    assert chat(workers, "s") == 2
    until(lambda: len(children_of(workers.pid) - {victim}) == 2)
    until(lambda: len(nodes_of(workers)) == 2)
    assert chat(workers, "s") == 3


def test_workers_are_replaced_without_a_failed_request(workers: ServerProcess) -> None:
    """On SIGHUP each gets a successor; requests that come meanwhile are all answered."""
    before = children_of(workers.pid)
    os.kill(workers.pid, signal.SIGHUP)
    turns = 0
    give_up_at = time.monotonic() + SOON_S
    while children_of(workers.pid) & before or len(children_of(workers.pid)) != 2:
        turns += 1
        assert chat(workers, "s") == turns
        assert time.monotonic() < give_up_at, "they were not replaced"
    assert chat(workers, "s") == turns + 1


def test_all_end_together(workers: ServerProcess) -> None:
    """SIGTERM ends all with code 0; a ``kill -9`` of the first process does not leave the others."""
    children = children_of(workers.pid)
    assert workers.stop() == 0
    assert all(map(is_gone, children))
    workers.start()
    children = children_of(workers.pid)
    workers.kill()
    until(lambda: all(map(is_gone, children)))


def test_a_turn_that_runs_may_end(workers: ServerProcess) -> None:
    """A stream that is open at SIGTERM is finished before its worker ends."""
    stream = workers.stream("/chat/stream", {"session_id": "s", "message": "tell me a story"})
    events = iter(stream)
    assert next(events)["type"] == "turn.started"
    os.kill(workers.pid, signal.SIGTERM)
    assert [event["type"] for event in events][-1] == "turn.finished"
    assert workers.wait() == 0


@pytest.mark.parametrize("store_url", ["memory://", "sqlite:///./pool.db"])
def test_what_cannot_be_shared_is_refused(tmp_path: Path, store_url: str) -> None:
    """Workers of a store that only one process can have are one line and exit code 1."""
    ended = run_server(tmp_path, store_url)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "--workers needs a store that processes can share" in ended.stderr


def test_workers_that_cannot_start_end_all(tmp_path: Path) -> None:
    """If the store cannot be reached the command ends, says why, and starts nothing again and again."""
    ended = run_server(tmp_path, "postgresql://someone:hidden@127.0.0.1:1/nothing")
    assert ended.returncode == 1
    assert "all end, since not all were ready yet" in ended.stderr
    assert "hidden" not in ended.stderr + ended.stdout


def run_server(folder: Path, store_url: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--workers", "2"],
        cwd=folder,
        env=os.environ | {"STORE_URL": store_url},
        capture_output=True,
        text=True,
        timeout=60,
    )
