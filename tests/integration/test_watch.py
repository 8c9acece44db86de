"""Watching turns over real sockets: cut off and resumed, together, from anywhere, and from the store."""

import asyncio
import json
import random
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Self

import httpx2
import pytest

from app.api.protocol import PushingProtocol, limit_send_buffer
from app.config import Settings
from app.runtime import Runtime
from tests.integration.test_http_chat import STALL, Chat, Stream, says
from tests.integration.test_http_server import HttpServer, Json, serving
from tests.modelserver import ModelServer

RESET = struct.pack("ii", 1, 0)
DELTAS = 2000
CUTS = 200


class WatchServer(HttpServer):
    """With the connections that ``app.server`` gives to uvicorn; these stall after 0.2 s."""

    class Impatient(PushingProtocol):
        STALLED_S = 0.2

    def __enter__(self) -> Self:
        self._server.config.http = self.Impatient
        super().__enter__()
        limit_send_buffer(self._server.servers[0].sockets[0])
        return self


class RawWatcher:
    """One watcher on a socket of its own, so that it can leave as rudely as it likes."""

    def __init__(self, port: int, method: str, path: str, body: Json | None = None, last: str = "") -> None:
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(content)}"]
        lines += ["Content-Type: application/json"] if content else []
        lines += [f"Last-Event-ID: {last}"] if last else []
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        self._file = self.socket.makefile("rb")

    @cached_property
    def status(self) -> int:
        """The status; waits for the head of the answer."""
        number = int(self._file.readline().split()[1])
        while self._file.readline() not in (b"\r\n", b""):
            pass
        return number

    def events(self) -> Iterator[Json]:
        """Yield the events in what arrives; each chunk has to hold whole ones."""
        assert self.status == 200
        while size := int(self._file.readline() or b"0", 16):
            chunk = self._file.read(size + 2)
            if len(chunk) < size + 2:
                return
            assert chunk.endswith(b"\n\n\r\n")
            for frame in chunk[:-4].split(b"\n\n"):
                fields = dict(line.split(b": ", 1) for line in frame.split(b"\n"))
                if b"data" in fields:
                    event: Json = json.loads(fields[b"data"])
                    assert fields[b"id"].decode() == f"{event['turn_id']}:{event['seq']}"
                    yield event

    def leave(self, how: str) -> None:
        """End the connection with a FIN, a RST, or a half-close, after which the server ends it."""
        if how == "rst":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if how == "half":
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(65536):
                pass
        self._file.close()
        self.socket.close()


def settings_of(models: ModelServer) -> Json:
    return {
        "model_provider": "openai",
        "openai_api_key": "k",
        "openai_base_url": models.base_url,
        "openai_models": ("*",),
    }


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture
def runtime(models: ModelServer) -> Runtime:
    models.reset()
    return Runtime(Settings(store_url="memory://", **settings_of(models)), tools=[clock])


@pytest.fixture
def chat(models: ModelServer, runtime: Runtime) -> Iterator[Chat]:
    with WatchServer(serving(runtime)) as server:
        moves = Chat(server, models)
        yield moves
        moves.close()


async def clock() -> str:
    """Tell the time."""
    return "noon"


def count_tasks(chat: Chat) -> int:
    asked: Future[int] = Future()
    loop = chat.server.loop
    loop.call_soon_threadsafe(lambda: asked.set_result(len(asyncio.all_tasks(loop))))
    return asked.result(5)


def text_of(events: list[Json]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "text.delta")


def test_two_hundred_cuts(chat: Chat, runtime: Runtime) -> None:
    """A client that is cut off 200 times in an answer of 2,000 deltas has all of it, each event once.

    It leaves no watcher, no waiter and no task behind.
    """
    dice = random.Random(11)
    words = "".join(f"{n:04d} " for n in range(DELTAS))
    message = says(words, chunks=DELTAS, delay_s=0.004)
    chat.say(session_id="other")
    tasks = count_tasks(chat)
    watcher = RawWatcher(chat.server.port, "POST", "/chat/stream", {"session_id": "s", "message": message})
    seen: list[Json] = []
    for _ in range(CUTS):
        stream, wanted = watcher.events(), dice.randrange(13)
        if not seen:
            wanted += 1
        seen += [event for event, _ in zip(stream, range(wanted), strict=False)]
        watcher.leave(dice.choice(["fin", "rst", "half"]))
        turn_id = seen[-1]["turn_id"]
        path = f"/sessions/s/turns/{turn_id}/stream"
        watcher = RawWatcher(chat.server.port, "GET", path, last=f"{turn_id}:{len(seen)}")
    assert "turn.finished" not in [event["type"] for event in seen]
    flight = runtime._turns.get(turn_id)
    if flight is not None:
        chat.until(lambda: chat.active() and flight._watchers <= 1)
        assert len(flight.log._watches) <= 1
    seen += list(watcher.events())
    watcher.leave("fin")
    assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))
    assert text_of(seen) == words == seen[-2]["text"] == seen[-1]["reply"]
    assert len(seen) > DELTAS * 0.9  # those that arrive together may be one event
    assert len(chat.models.requests()) == 2
    chat.until(lambda: count_tasks(chat) <= tasks)


@pytest.mark.parametrize("count", [2, 10])
def test_watchers_at_once_get_the_same_bytes(chat: Chat, count: int) -> None:
    """From the start all see the same bytes, from the middle the same rest, live and afterwards."""
    with chat.stream(says("x" * 400, chunks=200, delay_s=0.004)) as response:
        stream = Stream(response)
        turn_id = stream.next()["turn_id"]
        path = f"/sessions/s/turns/{turn_id}/stream"

        def body(after: int) -> bytes:
            return chat.client.get(path, params={"after": after}).content

        with ThreadPoolExecutor(2 * count) as threads:
            whole = [threads.submit(body, 0) for _ in range(count)]
            rest = [threads.submit(body, 100) for _ in range(count)]
            bodies = {each.result() for each in whole}
            rests = {each.result() for each in rest}
    assert len(bodies) == len(rests) == 1
    (all_bytes,), (rest_bytes,) = bodies, rests
    assert (body(0), body(100)) == (all_bytes, rest_bytes)
    retry = b"retry: 2000\n\n"
    assert all_bytes.endswith(rest_bytes.removeprefix(retry))
    assert rest_bytes.startswith(retry + f"id: {turn_id}:101\n".encode())
    assert all_bytes.count(b"\nevent: text.delta\n") > 150


def test_the_replay_window_ends(models: ModelServer) -> None:
    """Within STREAM_REPLAY_S every delta can be had again; afterwards the stored turn is told instead."""
    with HttpServer(**settings_of(models), stream_replay_s=0.5) as server:
        chat = Chat(server, models)
        with chat.stream(says("a b c d", delay_s=0.05)) as response:
            events = Stream(response).rest()

        def again(after: int) -> list[Json]:
            with chat.watch(events[0]["turn_id"], after=after) as response:
                return Stream(response).rest()

        assert again(0) == events
        assert again(3) == events[3:]
        chat.until(lambda: len(again(0)) < len(events))
        assert again(0) == [events[0], again(0)[1], *events[-2:]]
        assert text_of(again(0)) == "a b c d"
        assert again(3) == events[-2:]
        chat.close()


def live_turn(chat: Chat, kind: str) -> list[Json]:
    """Carry out a turn that ends as ``kind`` says, and return its events as they came."""
    steps: dict[str, Json] = {
        "plain": {"mode": "text", "text": "one two three"},
        "thoughtful": {"mode": "think", "reasoning": "hmm hmm", "text": "one two three"},
        "tools": {"mode": "tools", "say": "let me see", "rounds": 2, "calls": [{"name": "clock"}] * 2},
        "failed": {"mode": "rst", "text": "half of it"},
        "failed at once": {"mode": "status", "status": 400},
        "tools, then failed": {
            "mode": "tools",
            "say": "let me see",
            "calls": [{"name": "clock"}],
            "next": {"mode": "status", "status": 400},
        },
        "kept": {"mode": "stall_mid", "text": "half of it"},
        "dropped": {"mode": "stall_mid", "text": "half of it"},
    }
    chat.models.script(steps[kind])
    with chat.stream("go") as response:
        stream = Stream(response)
        events = [stream.next()]
        if kind in ("kept", "dropped"):
            events.append(stream.next())
            chat.client.post("/sessions/s/cancel", json={"keep_partial": kind == "kept"})
        return events + stream.rest()


ENDS = ("message.completed", "turn.finished", "turn.failed", "turn.cancelled")
KINDS = ("plain", "thoughtful", "tools", "failed", "failed at once", "tools, then failed", "kept", "dropped")


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_store_the_numbers_are_those_of_the_live_stream(models: ModelServer, kind: str) -> None:
    """However a turn ended: ids ascend, each once; tools and ends as they were, the text in one delta."""
    models.reset()
    settings = Settings(store_url="memory://", stream_replay_bytes=0, **settings_of(models))
    with HttpServer(serving(Runtime(settings, tools=[clock]))) as server:
        chat = Chat(server, models)
        live = live_turn(chat, kind)
        turn_id, last = live[0]["turn_id"], live[-1]["seq"]

        def stored(after: int) -> list[Json]:
            with chat.watch(turn_id, after=after) as response:
                return [_shared(event) for event in Stream(response).rest()]

        everything = stored(0)
        numbers = [event["seq"] for event in everything]
        assert numbers == sorted(set(numbers))
        told = ("turn.started", "tool.called", "tool.returned", *ENDS)
        assert [event for event in everything if event["type"] in told] == [
            _shared(event) for event in live if event["type"] in told
        ]
        assert text_of(everything) == text_of(live)
        assert sum(event["type"] == "text.delta" for event in everything) == bool(text_of(live))
        for after in range(1, last):
            ends = [_shared(event) for event in live if event["type"] in ENDS and event["seq"] > after]
            assert stored(after) == ends
        with chat.watch(turn_id, after=last) as response:
            assert response.status_code == 204
        chat.close()


def _shared(event: Json) -> Json:
    """Leave out what names the request that is answered."""
    return {name: value for name, value in event.items() if name not in ("request_id", "instance")}


def test_a_watcher_that_stalls_is_gone_for_its_turn(models: ModelServer, monkeypatch: Any) -> None:
    """Who does not read is closed; with ``on_disconnect=cancel`` the turn ends then, its text kept."""
    monkeypatch.setattr("app.services.turns.UNWATCHED_S", 0.2)
    with WatchServer(**settings_of(models), model_max_bytes=64 << 20) as server:
        chat = Chat(server, models)
        models.script({"mode": "endless", "text": "x" * 20_000, "delay_s": 0.02})
        body = {"session_id": "s", "message": "go", "on_disconnect": "cancel"}
        content = json.dumps(body).encode()
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(("127.0.0.1", server.port))
            head = f"POST /chat/stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
            stalled.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            turn_id = chat.until(lambda: chat.active().get("turn_id"))
            turn = chat.until(lambda: _ended(chat, turn_id))
        assert turn["status"] == "cancelled"
        with chat.watch(turn_id, after=1) as response:
            assert Stream(response).rest()[-1]["reason"] == "disconnect"
        assert chat.client.get("/sessions/s/history").json()["messages"][1]["interrupted"] is True
        chat.close()


def _ended(chat: Chat, turn_id: str) -> Json | None:
    turn: Json = chat.client.get(f"/sessions/s/turns/{turn_id}").json()
    return None if turn["status"] == "running" else turn


def test_silent_watchers_that_leave_are_forgotten(chat: Chat, runtime: Runtime) -> None:
    """Of watchers of a silent turn that leave in any way nothing stays but the one that did not."""
    with chat.stream(STALL) as response:
        stream = Stream(response)
        turn_id = stream.next()["turn_id"]
        stream.next()
        flight = runtime._turns.get(turn_id)
        assert flight is not None
        tasks = count_tasks(chat)
        path = f"/sessions/s/turns/{turn_id}/stream"
        for how in ("fin", "rst", "half") * 10:
            watcher = RawWatcher(chat.server.port, "GET", path)
            assert next(watcher.events())["type"] == "turn.started"
            watcher.leave(how)
        chat.until(lambda: count_tasks(chat) <= tasks)
        assert (flight._watchers, len(flight.log._watches)) == (1, 1)
        chat.client.post("/sessions/s/cancel")
        assert stream.rest()[-1]["type"] == "turn.cancelled"
    assert not flight.log._watches


def test_an_answer_that_is_sent_to_nobody_ends(chat: Chat) -> None:
    """A plain answer is complete for a client that asks for its headers and then leaves in any way."""
    for how in ("fin", "rst", "half"):
        leaving = RawWatcher(chat.server.port, "POST", "/chat", {"message": "x"})
        assert leaving.status == 200
        leaving.leave(how)
    assert chat.client.get("/health").json()["status"] == "healthy"


def test_ids_of_other_turns_are_refused(chat: Chat) -> None:
    """An event id of another turn, a malformed one, and an unknown turn."""
    first, second = chat.say().json()["turn_id"], chat.say().json()["turn_id"]

    def status(turn_id: str, last: str) -> int:
        path = f"/sessions/s/turns/{turn_id}/stream"
        response: httpx2.Response = chat.client.get(path, headers={"Last-Event-ID": last})
        return response.status_code

    assert status(first, f"{second}:1") == 422
    for malformed in ("", "1", f"{first}:", f"{first}:-1", f"{first}:x", f"{first}:1:1", f"x{first}:1"):
        assert status(first, malformed) == 422, malformed
    assert status("0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11", "") in (404, 422)
