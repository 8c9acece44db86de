"""The end of a server process: who is told what, what is stored, and how long it takes."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.modelserver import ModelServer
from tests.serverprocess import Reply, ServerProcess

SOON_S = 10.0
STALL = '[[{"mode": "stall_mid", "text": "half"}]]'


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(50) as pool:
        yield pool


def served(folder: Path, models: ModelServer, **settings: str) -> ServerProcess:
    """Return a server whose model does what messages tell it."""
    provider = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": models.base_url, "OPENAI_MODEL": "m"}
    return ServerProcess(folder, **(provider | settings))


def says(text: str, **step: Any) -> str:
    """Return a message that makes the model say ``text``."""
    return f"[[{json.dumps({'mode': 'text', 'text': text, **step})}]]"


def until(condition: Callable[[], Any], seconds: float = SOON_S) -> Any:
    """Ask again until the answer is true; each question is a round trip to the server."""
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        if answer := condition():
            return answer
    raise AssertionError("it never happened")


def until_working(server: ServerProcess, active: int, waiting: int = 0) -> None:
    def is_so() -> bool:
        stats = server.request("GET", "/agent-stats").body
        return (stats["active_agents"], stats["waiting"]) == (active, waiting)

    until(is_so, 20)


def until_draining(server: ServerProcess) -> None:
    until(lambda: server.request("GET", "/ready").status == 503)


def chat(server: ServerProcess, session_id: str, message: str) -> tuple[Reply, float]:
    """Hold one turn; return its answer and when it came."""
    reply = server.request("POST", "/chat", {"session_id": session_id, "message": message})
    return reply, time.monotonic()


def watch(server: ServerProcess, session_id: str, message: str) -> tuple[list[Any], float]:
    """Stream one turn; return its events, or the refusal, and when it ended."""
    reader = server.stream("/chat/stream", {"session_id": session_id, "message": message})
    if reader.status != 200:
        assert reader.headers["content-type"] == "application/problem+json"
        reader.close()
        return [reader.status], time.monotonic()
    return list(reader), time.monotonic()


def assert_draining(reply: Reply) -> None:
    """Check that this is how the contract says that the server shuts down."""
    assert (reply.status, reply.body["code"]) == (503, "DRAINING")
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.headers["connection"] == "close"


def turns_of(server: ServerProcess, session_id: str) -> list[tuple[str, str | None]]:
    """Return status and reply of the session's stored turns, the newest first."""
    reply = server.request("GET", f"/sessions/{session_id}/turns")
    return [(turn["status"], turn["reply"]) for turn in reply.body["turns"]] if reply.status == 200 else []


def keep_alive(server: ServerProcess) -> http.client.HTTPConnection:
    """Return a connection to the server, opened but not used yet."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=SOON_S)
    connection.connect()
    return connection


def test_running_turns_end_well_and_waiting_ones_are_refused_at_once(tmp_path, models, threads):
    """Of 20 turns that run all are answered; of 20 that wait for a session or for room none waits on."""
    slow = says("one two three four", chunks=6, delay_s=1)
    limits = {"AGENT_MAX_INSTANCES": "20", "AGENT_CAPACITY_WAIT_S": "60"}
    with served(tmp_path, models, **limits) as server:
        answers = [threads.submit(chat, server, f"r{n}", slow) for n in range(10)]
        streams = [threads.submit(watch, server, f"r{n}", slow) for n in range(10, 20)]
        until_working(server, 20)
        refusals = [threads.submit(chat, server, f"r{n}", "next") for n in range(5, 15)]
        refusals += [threads.submit(chat, server, f"w{n}", "new") for n in range(5)]
        refused_streams = [threads.submit(watch, server, f"w{n}", "new") for n in range(5, 10)]
        until_working(server, 20, 20)
        os.kill(server.pid, signal.SIGTERM)
        began = time.monotonic()
        for refusal in refusals:
            assert_draining(refusal.result(SOON_S)[0])
        assert [future.result(SOON_S)[0] for future in refused_streams] == [[503]] * 5
        assert all(future.result()[1] < began + 1 for future in [*refusals, *refused_streams])
        for future in answers:
            reply, _ = future.result(SOON_S)
            assert (reply.status, reply.body["reply"]) == (200, "one two three four")
            assert reply.headers["connection"] == "close"
        assert all(future.result(SOON_S)[0][-1]["type"] == "turn.finished" for future in streams)
        last = max(future.result()[1] for future in [*answers, *streams])
        assert server.wait() == -signal.SIGTERM
        assert time.monotonic() < last + 2
        server.start()
        for n in range(20):
            assert turns_of(server, f"r{n}") == [("finished", "one two three four")]
        assert [turns_of(server, f"w{n}") for n in range(10)] == [[]] * 10


def test_turns_that_outlast_the_drain_are_cancelled_and_everyone_is_told(tmp_path, models, threads):
    """A stream, its second watcher and a plain chat hear of the drain, in time; what was said is stored."""
    with served(tmp_path, models, DRAIN_TIMEOUT_S="0.7") as server:
        plain = threads.submit(chat, server, "plain", STALL)
        stream = server.stream("/chat/stream", {"session_id": "stream", "message": STALL})
        events = iter(stream)
        turn_id = next(events)["turn_id"]
        assert next(events)["text"] == "half"
        watcher = server.stream(f"/sessions/stream/turns/{turn_id}/stream", method="GET")
        until(lambda: server.request("GET", "/sessions/plain/turns/active").status == 200)
        until(lambda: models.stats()["streaming"] == 2)
        os.kill(server.pid, signal.SIGTERM)
        began = time.monotonic()
        end = list(events)[-1]
        assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "drain", True)
        assert end["head"] == turn_id
        assert list(watcher)[-1] == end
        assert_draining(plain.result(SOON_S)[0])
        assert server.wait() == -signal.SIGTERM
        assert 0.7 <= time.monotonic() - began < 2.7
        assert "Traceback" not in server.log()
        server.start()
        assert turns_of(server, "plain") == turns_of(server, "stream") == [("cancelled", "half")]
        assert server.request("GET", "/sessions/stream").body["head"] == turn_id
        resumed = server.stream(
            f"/sessions/stream/turns/{turn_id}/stream",
            method="GET",
            headers={"Last-Event-ID": stream.ids[-1]},
        )
        assert resumed.status == 204
        resumed.close()


def test_server_answers_while_it_drains(tmp_path, models):
    """It still accepts, says DRAINING, is alive but not ready, and closes connections after each answer."""
    with served(tmp_path, models) as server:
        idle, unused = keep_alive(server), keep_alive(server)
        idle.request("GET", "/health")
        first = idle.getresponse()
        first.read()
        assert first.getheader("connection") is None
        sessions = server.request("GET", "/sessions").body["total"]
        stream = server.stream(
            "/chat/stream", {"session_id": "a", "message": says("a b c", chunks=3, delay_s=1)}
        )
        events = iter(stream)
        next(events)
        os.kill(server.pid, signal.SIGTERM)
        until_draining(server)
        assert idle.sock.recv(1) == b""
        assert_draining(server.request("GET", "/ready"))
        assert_draining(server.request("POST", "/chat", {"session_id": "a", "message": "hello"}))
        assert_draining(server.request("POST", "/chat/stream", {"message": "hello"}))
        assert server.request("GET", "/agent-stats").body["draining"] is True
        unused.request("GET", "/health")
        answer = unused.getresponse()
        assert (answer.status, answer.getheader("connection")) == (200, "close")
        assert server.request("GET", "/sessions").body["total"] == sessions + 1
        assert list(events)[-1]["type"] == "turn.finished"
        assert server.wait() == -signal.SIGTERM
        unused.close()
        idle.close()


def test_request_on_its_way_is_answered(tmp_path, models):
    """A request that comes on a keep-alive connection with the signal gets an answer, and a goodbye."""
    with served(tmp_path, models) as server:
        connection = keep_alive(server)
        for _ in range(3):
            connection.request("GET", "/health")
            connection.getresponse().read()
        os.kill(server.pid, signal.SIGTERM)
        connection.request("POST", "/chat", b'{"session_id": "a"', {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 400
        answer.read()
        assert server.wait() == -signal.SIGTERM
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_equal_signals_within_a_second_are_one(tmp_path, models, number):
    """A signal that comes twice, as from a terminal and from a supervisor, still lets the turn end."""
    with served(tmp_path, models) as server:
        events = iter(server.stream("/chat/stream", {"message": says("a b", chunks=2, delay_s=1.5)}))
        next(events)
        os.kill(server.pid, number)
        os.kill(server.pid, number)
        until_draining(server)
        os.kill(server.pid, number)
        assert list(events)[-1]["type"] == "turn.finished"
        assert server.wait() == -number
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_later_signal_skips_the_wait(tmp_path, models, second):
    """A second signal a second later, or another one, cancels what runs at once; that is kept and told."""
    with served(tmp_path, models, DRAIN_TIMEOUT_S="60") as server:
        message = says("a b c d e f", chunks=30, delay_s=0.5)
        events = iter(server.stream("/chat/stream", {"session_id": "a", "message": message}))
        next(events)
        os.kill(server.pid, signal.SIGTERM)
        began = time.monotonic()
        if second is signal.SIGTERM:
            while time.monotonic() < began + 1.1:
                next(events)
        else:
            until_draining(server)
        os.kill(server.pid, second)
        end = list(events)[-1]
        assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "drain", True)
        assert server.wait() == -second
        assert time.monotonic() < began + 4
        assert "Traceback" not in server.log()


def test_clients_that_do_not_read_or_write_hold_nothing_up(tmp_path, models):
    """A watcher that never reads and a request that never ends are cut off, and the log says so."""
    with served(tmp_path, models) as server:
        address = urlsplit(server.url)
        deaf, slow = socket.socket(), socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for client in (deaf, slow):
            client.connect((address.hostname, address.port))
        head = "POST /chat/stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        models.script({"mode": "text", "text": "x" * 3_000_000, "chunks": 30})
        body = b'{"session_id": "a", "message": "speak"}'
        deaf.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        until(lambda: [status for status, _ in turns_of(server, "a")] == ["finished"], 20)
        os.kill(server.pid, signal.SIGTERM)
        began = time.monotonic()
        assert server.wait() == -signal.SIGTERM
        assert time.monotonic() < began + 6
        assert server.log().count("a connection did not end in time") == 2
        assert "Traceback" not in server.log()
        deaf.close()
        slow.close()


def run_cli(folder: Path, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "serve", *arguments],
        cwd=folder,
        env=os.environ | {"MODEL_PROVIDER": "demo", "STORE_URL": "memory://"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_port_in_use_is_one_line(tmp_path):
    """A start on a port that somebody has ends with one line that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_cli(tmp_path, "--port", str(port))
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"agentpool: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["closed", "file", "connected", "reachable"])
def test_wrong_descriptor_is_one_line(tmp_path, kind):
    """A descriptor that is no listening socket, or that strangers reach, ends the start with one line."""
    with socket.socket() as some, (tmp_path / "x").open("w") as file:
        if kind == "reachable":
            some.bind(("0.0.0.0", 0))
            some.listen()
        descriptor = {"closed": 99, "file": file.fileno()}.get(kind, some.fileno())
        passed = () if kind == "closed" else (descriptor,)
        ended = run_cli(tmp_path, "--fd", str(descriptor), pass_fds=passed)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert ("--insecure" if kind == "reachable" else f"descriptor {descriptor}: ") in ended.stderr


def test_ctrl_c_twice_ends_without_a_word(tmp_path):
    """Two SIGINT in quick succession end an idle server at once and without a traceback."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        began = time.monotonic()
        os.kill(server.pid, signal.SIGINT)
        os.kill(server.pid, signal.SIGINT)
        assert server.wait() == -signal.SIGINT
        assert time.monotonic() < began + 2
        assert "Traceback" not in server.log()
