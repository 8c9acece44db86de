"""Watchers that never read: what they cost, whom they disturb, and that they are closed.

The whole of it: ``pytest tests/acceptance/test_watch_stalled.py --stalled 500 --stalled-s 60``.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.modelserver import ModelServer
from tests.serverprocess import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
TURNS = 2
TEXT_BYTES = 1_200_000
DELTAS = 400
MORE_RSS_BYTES = 50 << 20
KERNEL_BYTES = 256_000
LOWERED_S = 1.5
LOWER = f"import app.api.protocol\napp.api.protocol.BoundedProtocol.STALLED_S = {LOWERED_S}\n"


@dataclass(frozen=True)
class Scale:
    """How many watchers, how long their turns take, and when a stalled one is closed."""

    watchers: int
    turn_s: float
    limit_s: float


@pytest.fixture
def scale(pytestconfig: pytest.Config) -> Scale:
    """Fifty for a short time with a lower limit, unless the command line asks for more."""
    watchers = pytestconfig.getoption("--stalled", default=0)
    seconds = pytestconfig.getoption("--stalled-s", default=60)
    return Scale(watchers, seconds, 30) if watchers else Scale(50, 6, LOWERED_S)


@pytest.fixture
def model() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture
def server(scale: Scale, model: ModelServer, tmp_path: Path) -> Iterator[ServerProcess]:
    settings = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": model.base_url, "OPENAI_MODEL": "m"}
    settings |= {"STREAM_REPLAY_BYTES": "0"}  # the logs of turns that have ended are not the question
    if scale.limit_s == LOWERED_S:  # the limit is no setting: the process finds it changed
        (tmp_path / "sitecustomize.py").write_text(LOWER)
        settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    with ServerProcess(tmp_path, **settings) as running:
        yield running


class LongTurns:
    """Some turns with long answers, each read to its end by one good watcher in a thread."""

    def __init__(self, server: ServerProcess, model: ModelServer, name: str, seconds: float) -> None:
        self._server = server
        step = {"mode": "text", "text": "x" * TEXT_BYTES, "chunks": DELTAS, "delay_s": seconds / DELTAS}
        model.script(*[step] * TURNS)
        self.paths: dict[str, str] = {}
        self.ends: list[str] = []
        self._begun = threading.Barrier(TURNS + 1)
        self._threads = [threading.Thread(target=self._read, args=(f"{name}-{n}",)) for n in range(TURNS)]
        for thread in self._threads:
            thread.start()
        self._begun.wait(20)

    @property
    def are_running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _read(self, session_id: str) -> None:
        events = iter(self._server.stream("/chat/stream", {"session_id": session_id, "message": "go"}))
        self.paths[session_id] = f"/sessions/{session_id}/turns/{next(events)['turn_id']}"
        next(events)  # the model has taken its step
        self._begun.wait(20)
        self.ends.append(list(events)[-1]["type"])


class Stalled:
    """Watchers that ask and never read."""

    def __init__(self, server: ServerProcess, paths: list[str], count: int) -> None:
        address = urlsplit(server.url)
        assert address.port is not None
        self._server_port = address.port
        self._sockets = [socket.socket() for _ in range(count)]
        for i, each in enumerate(self._sockets):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.connect((address.hostname, address.port))
            each.sendall(f"GET {paths[i % len(paths)]}/stream HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        self._ports = {each.getsockname()[1] for each in self._sockets}
        self._queued: dict[int, tuple[int, float]] = {}
        self.most_queued = 0
        self.closed_s: list[float] = []  # from the last byte that the kernel took to the end

    def __len__(self) -> int:
        return len(self._ports)

    @property
    def have_stalled(self) -> bool:
        """Whether the kernel takes no more for any of them."""
        return len(self._queued) == len(self._sockets) and all(
            time.monotonic() - at > 0.5 for _, at in self._queued.values()
        )

    def look(self) -> None:
        """Note what the kernel holds for each connection, and which are not there any more."""
        now, queued = time.monotonic(), _send_queues(self._server_port)
        for port in list(self._ports):
            if port not in queued:
                self._ports.discard(port)
                self.closed_s.append(now - self._queued[port][1])
            elif port not in self._queued or self._queued[port][0] != queued[port]:
                self._queued[port] = (queued[port], now)
                self.most_queued = max(self.most_queued, queued[port])

    def count_resets(self) -> int:
        """Read what is left on every connection and say how many were reset."""
        return sum(_was_reset(each) for each in self._sockets)


def _was_reset(client: socket.socket) -> bool:
    with client:
        try:
            while client.recv(1 << 16):
                pass
        except ConnectionResetError:
            return True
    return False


def _send_queues(server_port: int) -> dict[int, int]:
    """Return how many bytes the kernel has to send on each established connection, by the other's port."""
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, queues, *_ = line.split()
        if state == "01" and int(local.rpartition(":")[2], 16) == server_port:
            found[int(remote.rpartition(":")[2], 16)] = int(queues.partition(":")[0], 16)
    return found


class Bystander:
    """Another client: chats as long as it is asked to, and watches the server's memory."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._chats_s: list[float] = []
        self.rss = 0

    @property
    def p95_s(self) -> float:
        return sorted(self._chats_s)[int(len(self._chats_s) * 0.95)]

    def chat(self) -> None:
        begun = time.monotonic()
        body = {"session_id": f"c{len(self._chats_s) % 20}", "message": '[[{"mode": "text", "text": "hi"}]]'}
        assert self._server.request("POST", "/chat", body).status == 200
        self._chats_s.append(time.monotonic() - begun)
        status = Path(f"/proc/{self._server.pid}/status").read_text()
        self.rss = max(self.rss, int(status.partition("VmRSS:")[2].split()[0]) << 10)


@pytest.mark.timeout(300)
def test_watchers_that_do_not_read(scale: Scale, server: ServerProcess, model: ModelServer) -> None:
    """They are closed after the limit; until then they cost little, and neither turns nor others notice."""
    before, while_filled, during = Bystander(server), Bystander(server), Bystander(server)
    turns = LongTurns(server, model, "before", min(scale.turn_s, 15))
    while turns.are_running:
        before.chat()
    turns = LongTurns(server, model, "during", scale.turn_s)
    stalled = Stalled(server, list(turns.paths.values()), scale.watchers)
    give_up_at = time.monotonic() + scale.turn_s + scale.limit_s + 30
    while turns.are_running or (len(stalled) and time.monotonic() < give_up_at):
        for _ in range(10):
            (during if stalled.have_stalled else while_filled).chat()
        stalled.look()
    more_rss = max(during.rss, while_filled.rss) - before.rss
    print(  # noqa: T201
        f"{scale.watchers} stalled: RSS {before.rss >> 20} MB, {more_rss / (1 << 20):+.1f} MB;"
        f" kernel at most {stalled.most_queued:,} bytes each; closed after"
        f" {min(stalled.closed_s, default=0):.1f} to {max(stalled.closed_s, default=0):.1f} s;"
        f" p95 of chats {before.p95_s * 1000:.1f} -> {during.p95_s * 1000:.1f} ms"
        f" ({while_filled.p95_s * 1000:.1f} ms while their buffers were filled)"
    )
    assert turns.ends == ["turn.finished"] * TURNS
    assert [server.request("GET", path).body["status"] for path in turns.paths.values()] == [
        "finished"
    ] * TURNS
    assert len(stalled.closed_s) == scale.watchers
    assert scale.limit_s - 1 < min(stalled.closed_s)
    assert max(stalled.closed_s) < scale.limit_s + 10
    assert stalled.count_resets() == scale.watchers
    assert 16_000 < stalled.most_queued <= KERNEL_BYTES
    assert more_rss <= MORE_RSS_BYTES
    assert during.p95_s < 2 * before.p95_s + 0.05
    assert "Traceback" not in server.log()
