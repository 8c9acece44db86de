"""Watchers of a real process: it dies under them, and it has nothing to do when they have gone."""

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.modelserver import ModelServer
from tests.serverprocess import EventReader, ServerProcess

BEAT_S = 0.25
TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


def settings_of(model: ModelServer, **more: str) -> dict[str, str]:
    address = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": model.base_url, "OPENAI_MODEL": "m"}
    return address | {"STREAM_HEARTBEAT_S": str(BEAT_S), **more}


def test_who_watched_a_turn_that_died_is_told_so(tmp_path: Path, model: ModelServer) -> None:
    """From any position of the live stream ``turn.failed``, INTERRUPTED, follows, once."""
    with ServerProcess(tmp_path, **settings_of(model)) as server:
        model.script({"mode": "endless", "text": "on and on ", "delay_s": 0.005})
        stream = server.stream("/chat/stream", {"session_id": "a", "message": "go"})
        events = [event for event, _ in zip(stream, range(40), strict=False)]
        # The start record shares the next commit's fsync: another session's turn brings it to disk.
        server.request("POST", "/chat", {"session_id": "b", "message": "x"})
        server.kill()
        stream.close()
        server.start()
        path = f"/sessions/a/turns/{events[0]['turn_id']}/stream"

        def again(last: str) -> tuple[EventReader, list[dict[str, Any]]]:
            reader = server.stream(path, method="GET", headers={"Last-Event-ID": last})
            return reader, list(reader)

        for seen in (1, 2, len(events)):
            reader, rest = again(stream.ids[seen - 1])
            assert [(event["type"], event["code"]) for event in rest] == [("turn.failed", "INTERRUPTED")]
            assert rest[0]["seq"] > events[seen - 1]["seq"]
            after, nothing = again(reader.ids[-1])
            assert (after.status, nothing) == (204, [])
        everything = list(server.stream(path, method="GET"))
        assert [event["type"] for event in everything] == ["turn.started", "turn.failed"]
        assert everything[-1]["seq"] == rest[0]["seq"]
        assert server.request("GET", "/sessions/a").body["message_count"] == 0


class Leaver:
    """A watcher that reads its first bytes, if there are any soon, and goes."""

    def __init__(self, server: ServerProcess, path: str) -> None:
        address = urlsplit(server.url)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect((address.hostname, address.port))
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert self.socket.recv(12) == b"HTTP/1.1 200"

    def leave(self, how: str) -> None:
        if how == "rst":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "half":
            self.socket.shutdown(socket.SHUT_WR)
        self.socket.close()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def begin_silent(server: ServerProcess, model: ModelServer) -> str:
    """Begin a turn that says something and falls silent; return its path."""
    model.script({"mode": "stall_mid", "text": "half"})
    stream = server.stream("/chat/stream", {"session_id": "silent", "message": "go"})
    turn_id = next(iter(stream))["turn_id"]
    stream.close()
    return f"/sessions/silent/turns/{turn_id}/stream"


def finish_long(server: ServerProcess, model: ModelServer) -> str:
    """Carry out a turn of which a replay is longer than what a connection holds; return its path."""
    model.script({"mode": "text", "text": "x" * 800_000, "chunks": 4000, "burst": True})
    answer = server.request("POST", "/chat", {"session_id": "long", "message": "go"}).body
    return f"/sessions/long/turns/{answer['turn_id']}/stream"


@pytest.mark.parametrize("replay_bytes", ["67108864", "0"], ids=["from the log", "from the store"])
def test_watchers_that_have_gone_cost_nothing(tmp_path: Path, model: ModelServer, replay_bytes: str) -> None:
    """After watchers of a replay and of a silent turn have left in any way, the server idles and serves."""
    model.reset()
    with ServerProcess(tmp_path, **settings_of(model, STREAM_REPLAY_BYTES=replay_bytes)) as server:
        paths = begin_silent(server, model), finish_long(server, model)
        leavers = [Leaver(server, path) for path in paths * 15]
        for i, leaver in enumerate(leavers):
            leaver.leave(("fin", "rst", "half")[i // 2 % 3])
        staying = Leaver(server, paths[0])
        beats = (line for line in staying.socket.makefile("rb") if line.startswith(b":"))
        next(beats)
        begun, used = time.monotonic(), cpu_seconds(server.pid)
        for _ in range(8):
            next(beats)
        took = time.monotonic() - begun
        assert took > 7 * BEAT_S
        assert cpu_seconds(server.pid) - used < 0.1 * took
        beats.close()
        staying.leave("fin")
        assert server.request("GET", "/health").body["status"] == "healthy"
        assert server.request("POST", "/chat", {"session_id": "c", "message": "x"}).status == 200
        assert server.request("POST", "/sessions/silent/cancel").status == 202
        assert "Traceback" not in server.log()
