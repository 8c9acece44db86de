"""Cancelling a turn wherever it is: what its stream, the store, the model and the next turn see of it."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from app.config import Settings
from app.runtime import Runtime
from app.stores.memory.store import MemoryStore
from tests.fakes import FakeStore, Fault, Gate
from tests.integration.test_http_chat import Chat, Stream, says
from tests.integration.test_http_server import HttpServer, Json, problem, serving
from tests.modelserver import ModelServer

KINDS = ("lean", "stock")
CANCELLED_WITHIN_S = 2.0
CLOSED_WITHIN_S = 1.0
HELLO, AFTER = "Hello there", "And what did I say before?"


@dataclass
class Bench:
    """The agents' tools, and what was done with them."""

    begun: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    _begins: threading.Condition = field(default_factory=threading.Condition)

    def begin(self, name: str) -> None:
        with self._begins:
            self.begun.append(name)
            self._begins.notify_all()

    def wait_begun(self, name: str) -> None:
        """Return when the tool has been called."""
        with self._begins:
            assert self._begins.wait_for(lambda: name in self.begun, 10)

    def tools(self) -> list[Callable[..., Any]]:
        async def clock() -> str:
            """Tell the time."""
            self.begin("clock")
            return "noon"

        async def hang() -> str:
            """Never return."""
            self.begin("hang")
            await Gate().wait()
            return "never"

        def block() -> str:
            """Block a thread."""
            self.begin("block")
            self.gate.wait(60)
            return "late"

        return [clock, hang, block]


def tools(*names: str, **more: Any) -> Json:
    calls = [{"name": name, "arguments": "{}", "id": f"call_{name}"} for name in names]
    return {"mode": "tools", "calls": calls, **more}


def raw(*deltas: Json) -> Json:
    """Return a step that says ``deltas`` and is silent then."""
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    data = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return {"mode": "raw", "data": data, "hold": True}


def said(text: str) -> Json:
    return {"role": "assistant", "content": text}


def called(name: str, result: str, text: str | None = None) -> list[Json]:
    call = {"id": f"call_{name}", "function": {"arguments": "{}", "name": name}, "type": "function"}
    return [
        {"role": "assistant", "tool_calls": [call], "content": text},
        {"content": result, "role": "tool", "tool_call_id": f"call_{name}"},
    ]


@dataclass(frozen=True)
class Place:
    """Where a cancel lands: what the model does, what shows that it is there, and what is kept.

    ``reached``: an event of the stream, a tool that has begun, or ``""``: the model is asked for
    the ``asked``-th time. ``reply``: the texts that are kept, joined.
    """

    step: Json
    reached: str = ""
    kept: tuple[Json, ...] = ()
    reply: str = ""
    asked: int = 1


ARGUMENTS = {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "clock", "arguments": "{"}}]}
SILENT, HALF = {"mode": "never_headers"}, {"mode": "stall_mid", "text": "It is"}
LOOK = "Let me see. "
PLACES: dict[str, Place] = {
    "no headers yet": Place(SILENT),
    "no token yet": Place({"mode": "stall_first"}),
    "only comments": Place({"mode": "stall_first", "comments": True}),
    "only reasoning": Place(raw({"reasoning_content": "Hm"}), "reasoning.delta"),
    "in the middle": Place(HALF, "text.delta", (said("It is"),), "It is"),
    "words for ever": Place({"mode": "drip", "text": "It is"}, "text.delta", (said("It is"),), "It is"),
    "in a tool's arguments": Place(raw(said("It is"), ARGUMENTS), "text.delta", (said("It is"),), "It is"),
    "in an async tool": Place(tools("hang", say=LOOK), "hang", (said(LOOK),), LOOK),
    "in an async tool, nothing said": Place(tools("hang"), "hang"),
    "in two async tools": Place(tools("clock", "hang", say=LOOK), "hang", (said(LOOK),), LOOK),
    "in a thread": Place(tools("block", say=LOOK), "block", (said(LOOK),), LOOK),
    "in a thread, nothing said": Place(tools("block"), "block"),
    "silent after a tool": Place(
        tools("clock", say=LOOK, next=SILENT), "", tuple(called("clock", "noon", LOOK)), LOOK, asked=2
    ),
    "silent after a silent tool": Place(
        tools("clock", next=SILENT), "", tuple(called("clock", "noon")), "", asked=2
    ),
    "in the middle after a tool": Place(
        tools("clock", next=HALF), "text.delta", (*called("clock", "noon"), said("It is")), "It is"
    ),
    "in the second tool": Place(
        tools("clock", next=tools("hang", rounds=2)), "hang", tuple(called("clock", "noon"))
    ),
}


class Cancelling(Chat):
    """A server, its model and its tools, and the moves of these tests."""

    def __init__(self, server: HttpServer, models: ModelServer, bench: Bench) -> None:
        super().__init__(server, models)
        self.bench = bench

    def wait_reached(self, stream: Stream, place: Place) -> list[Json]:
        """Return the events up to the one that shows that the turn is at ``place``."""
        events = [stream.next()]
        if place.reached in ("hang", "block"):
            self.bench.wait_begun(place.reached)
        elif place.reached:
            while events[-1]["type"] != place.reached:
                events.append(stream.next())
        else:
            asked = 1 + place.asked  # the turn before was one
            self.until(lambda: self.models.stats()["requests"] == asked)
        return events

    def cancel(self, session_id: str = "s", **body: Any) -> float:
        """Ask for a cancel, and return when."""
        begun = time.monotonic()
        assert self.client.post(f"/sessions/{session_id}/cancel", json=body).status_code == 202
        return begun

    def wait_closed(self) -> None:
        give_up_at = time.monotonic() + CLOSED_WITHIN_S
        while (stats := self.models.stats())["streaming"] or stats["open"] > 1:
            assert time.monotonic() < give_up_at, stats

    def sent_last(self) -> list[Json]:
        """Return what the model was sent last, without the system prompt."""
        messages: list[Json] = self.models.requests()[-1]["messages"]
        return messages[1:]

    def stats(self) -> Json:
        document: Json = self.client.get("/agent-stats").json()
        return document


@pytest.fixture(scope="module")
def model_server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


def runtime(kind: str, models: ModelServer, bench: Bench, store: Any = None, **settings: Any) -> Runtime:
    values = {
        "store_url": "memory://",
        "model_provider": "openai",
        "openai_api_key": "sk-test",
        "openai_base_url": models.base_url,
        "model_client": kind,
        **settings,
    }
    return Runtime(Settings(**values), store=store, tools=bench.tools())


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def chat(kind: str, model_server: ModelServer) -> Iterator[Cancelling]:
    bench = Bench()
    model_server.reset()
    with HttpServer(serving(runtime(kind, model_server, bench))) as server:
        moves = Cancelling(server, model_server, bench)
        yield moves
        bench.gate.set()
        moves.close()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_a_cancel(chat: Cancelling, caplog: pytest.LogCaptureFixture, name: str, keep: bool) -> None:
    """It ends the turn in time, keeps exactly what was completed, and the next turn goes on from there."""
    place = PLACES[name]
    first = chat.say(says(HELLO)).json()
    message = f"[[{json.dumps(place.step)}]]"
    with chat.stream(message) as response:
        stream = Stream(response)
        events = chat.wait_reached(stream, place)
        begun = list(chat.bench.begun)
        asked_at = chat.cancel(keep_partial=keep)
        end = (events + stream.rest())[-1]
        assert time.monotonic() - asked_at < CANCELLED_WITHIN_S
    chat.wait_closed()
    kept = list(place.kept) if keep else []
    turn_id = response.headers["x-turn-id"]
    assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "user", bool(kept))
    assert (end["head"], end["message_count"]) == ((turn_id, 4) if kept else (first["head"], 2))
    record = chat.client.get(f"/sessions/s/turns/{turn_id}").json()
    assert (record["status"], record["on_branch"]) == ("cancelled", bool(kept))
    history = chat.client.get("/sessions/s/history").json()["messages"]
    assert [each.get("interrupted", False) for each in history] == [
        False,
        False,
        *([False, True] * bool(kept)),
    ]
    if kept:
        assert (history[-2]["content"], history[-1]["content"]) == (message, place.reply)
    assert chat.stats()["discards"]["cancel"] == 1
    after = chat.say(AFTER).json()
    assert (after["activation"], after["turn_count"]) == ("restored", 3 if kept else 2)
    before = [{"content": says(HELLO), "role": "user"}, said(HELLO)]
    kept = [{"content": message, "role": "user"}, *kept] if kept else []
    assert chat.sent_last() == [*before, *kept, {"content": AFTER, "role": "user"}]
    assert chat.bench.begun == begun
    loud = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert [each for each in loud if "ignores its cancellation" not in each] == []
    assert bool(loud) == ("thread" in name)


def test_a_cancel_of_a_first_turn_leaves_a_new_session(chat: Cancelling) -> None:
    """Nothing is kept of it, so there is nothing to restore."""
    with chat.stream(f"[[{json.dumps(SILENT)}]]") as response:
        stream = Stream(response)
        stream.next()
        chat.until(lambda: chat.models.stats()["streaming"])
        chat.cancel()
        assert stream.rest()[-1]["head"] is None
    assert chat.say(AFTER).json()["activation"] == "new"
    assert chat.sent_last() == [{"content": AFTER, "role": "user"}]


@pytest.mark.parametrize("name", ["no headers yet", "in the middle", "in an async tool", "in a thread"])
def test_a_cancel_of_a_plain_chat(chat: Cancelling, name: str) -> None:
    """The answer is a 409 that names the turn, in the same time."""
    place = PLACES[name]
    asked = chat.saying(f"[[{json.dumps(place.step)}]]")
    chat.until(lambda: chat.models.stats()["requests"])
    turn_id = chat.until(lambda: chat.active().get("turn_id"))
    if place.reached in ("hang", "block"):
        chat.bench.wait_begun(place.reached)
    asked_at = chat.cancel(keep_partial=False)
    assert problem(asked.result(10), 409, "TURN_CANCELLED")["turn_id"] == turn_id
    assert time.monotonic() - asked_at < CANCELLED_WITHIN_S
    chat.wait_closed()
    assert chat.client.get("/sessions/s/history").json()["messages"] == []


def test_a_tool_in_a_thread_keeps_its_place(model_server: ModelServer, kind: str) -> None:
    """A thread that blocks is a zombie: its place is taken until it ends, and is given back then."""
    bench, name = Bench(), "in a thread"
    model_server.reset()
    made = runtime(kind, model_server, bench, agent_max_instances=1, agent_capacity_wait_s=0.05)
    with HttpServer(serving(made)) as server:
        chat = Cancelling(server, model_server, bench)
        with chat.stream(f"[[{json.dumps(PLACES[name].step)}]]") as response:
            stream = Stream(response)
            stream.next()
            bench.wait_begun("block")
            asked_at = chat.cancel()
            assert stream.rest()[-1]["type"] == "turn.cancelled"
            assert time.monotonic() - asked_at < CANCELLED_WITHIN_S
        stats = chat.stats()
        assert (stats["zombie_agents"], stats["active_agents"], stats["total_agents"]) == (1, 0, 1)
        for session_id in ("s", "t"):
            problem(chat.say(AFTER, session_id=session_id), 503, "POOL_EXHAUSTED")
        bench.gate.set()
        chat.until(lambda: chat.stats()["total_agents"] == 0)
        assert chat.say(AFTER).json()["activation"] == "restored"
        stats = chat.stats()
        assert (stats["zombie_agents"], stats["total_agents"]) == (0, 1)
        chat.close()


def test_a_tool_in_a_thread_that_ends_soon_is_waited_for(chat: Cancelling) -> None:
    """The turn ends when its thread has, and there never is a zombie."""
    with chat.stream(f"[[{json.dumps(tools('block'))}]]") as response:
        stream = Stream(response)
        stream.next()
        chat.bench.wait_begun("block")
        chat.cancel()
        assert chat.active()["status"] == "running"
        chat.bench.gate.set()
        assert stream.rest()[-1]["type"] == "turn.cancelled"
    assert chat.stats()["total_agents"] == 0


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
def test_a_cancel_of_a_waiting_turn(chat: Cancelling, path: str, keep: bool) -> None:
    """It never asks the model, leaves no trace, and those before and behind it do not notice."""
    body = {"session_id": "s", "message": "never"}
    with chat.stream(f"[[{json.dumps(HALF)}]]") as response:
        stream = Stream(response)
        running = stream.next()["turn_id"]
        stream.next()
        waiting = chat._threads.submit(chat.client.post, path, json=body)
        (turn_id,) = chat.until_waiting(1)
        behind = chat.saying(AFTER)
        chat.until_waiting(2)
        asked_at = chat.cancel(turn_id=turn_id, keep_partial=keep)
        assert problem(waiting.result(10), 409, "TURN_CANCELLED")["turn_id"] == turn_id
        assert time.monotonic() - asked_at < CANCELLED_WITHIN_S
        assert chat.active()["turn_id"] == running
        chat.cancel(turn_id=running, keep_partial=False)
        assert stream.rest()[-1]["type"] == "turn.cancelled"
        assert behind.result(10).json()["turn_count"] == 1
    assert chat.sent_last() == [{"content": AFTER, "role": "user"}]
    turns = chat.client.get("/sessions/s/turns").json()["turns"]
    assert [turn["status"] for turn in turns] == ["finished", "cancelled"]
    problem(chat.client.get(f"/sessions/s/turns/{turn_id}"), 404, "TURN_NOT_FOUND")


def test_a_cancel_of_all(chat: Cancelling) -> None:
    """The running turn and all that wait end, and the session goes on as if none had been."""
    with chat.stream(f"[[{json.dumps(HALF)}]]") as response:
        stream = Stream(response)
        turn_id = stream.next()["turn_id"]
        stream.next()
        waiting = [chat.saying(f"never {i}") for i in range(2)]
        chat.until_waiting(2)
        cancelled = chat.client.post("/sessions/s/cancel", json={"all": True, "keep_partial": False})
        assert (cancelled.status_code, cancelled.json()) == (202, {"turn_id": turn_id})
        assert stream.rest()[-1]["type"] == "turn.cancelled"
        for each in waiting:
            problem(each.result(10), 409, "TURN_CANCELLED")
    assert len(chat.models.requests()) == 1
    chat.say(AFTER)
    assert chat.sent_last() == [{"content": AFTER, "role": "user"}]


def test_cancelling_twice_and_too_late(chat: Cancelling) -> None:
    """The first cancel decides; a second one changes nothing, and a finished turn cannot be cancelled."""
    with chat.stream(f"[[{json.dumps(HALF)}]]") as response:
        stream = Stream(response)
        turn_id = stream.next()["turn_id"]
        stream.next()
        chat.cancel()
        again = chat.client.post("/sessions/s/cancel", json={"keep_partial": False})
        assert again.status_code in (202, 409)
        ends = [event for event in stream.rest() if event["type"].startswith("turn.")]
    assert [(end["type"], end["partial_kept"]) for end in ends] == [("turn.cancelled", True)]
    finished = chat.say(AFTER).json()["turn_id"]
    for body in ({}, {"turn_id": turn_id}, {"turn_id": finished}, {"all": True}):
        problem(chat.client.post("/sessions/s/cancel", json=body), 409, "NO_ACTIVE_TURN")
    assert chat.say(AFTER).json()["activation"] == "warm"


@dataclass
class Slow:
    """A store whose commits wait until the test lets them."""

    store: FakeStore = field(default_factory=FakeStore)
    gate: Gate = field(default_factory=Gate)

    def hold_commit(self) -> None:
        self.store.plan("commit_turn", Fault(gate=self.gate))

    def let_go(self, server: HttpServer) -> None:
        server.loop.call_soon_threadsafe(self.gate.open)


@pytest.fixture
def slow(kind: str, model_server: ModelServer) -> Iterator[tuple[Cancelling, Slow]]:
    model_server.reset()
    bench, slow = Bench(), Slow()
    assert isinstance(slow.store.inner, MemoryStore)
    with HttpServer(serving(runtime(kind, model_server, bench, slow.store))) as server:
        moves = Cancelling(server, model_server, bench)
        yield moves, slow
        moves.close()


@pytest.mark.parametrize("body", [{}, {"keep_partial": False}, {"all": True}])
def test_a_cancel_that_comes_while_the_turn_is_committed_has_lost(
    slow: tuple[Cancelling, Slow], body: Json
) -> None:
    """The turn finishes, is stored whole, and its agent stays."""
    chat, store = slow
    chat.say(says(HELLO))
    store.hold_commit()
    with chat.stream(says("All of it")) as response:
        stream = Stream(response)
        while stream.next()["type"] != "message.completed":
            pass
        chat.cancel(**body)
        chat.cancel(**body)
        store.let_go(chat.server)
        (end,) = stream.rest()
    assert (end["type"], end["reply"], end["message_count"]) == ("turn.finished", "All of it", 4)
    history = chat.client.get("/sessions/s/history").json()["messages"]
    assert not any("interrupted" in message for message in history)
    assert chat.say(AFTER).json()["activation"] == "warm"
    assert chat.sent_last()[-2] == said("All of it")


def test_a_cancel_that_comes_while_a_partial_is_committed_has_lost(slow: tuple[Cancelling, Slow]) -> None:
    """What the first cancel kept is kept, whatever the second one asks for."""
    chat, store = slow
    chat.say(says(HELLO))
    store.hold_commit()
    with chat.stream(f"[[{json.dumps(HALF)}]]") as response:
        stream = Stream(response)
        while stream.next()["type"] != "text.delta":
            pass
        chat.cancel(keep_partial=True)
        chat.wait_closed()
        chat.cancel(keep_partial=False)
        store.let_go(chat.server)
        (end,) = stream.rest()
    assert (end["type"], end["partial_kept"]) == ("turn.cancelled", True)
    assert chat.say(AFTER).json()["activation"] == "restored"
    assert chat.sent_last()[-2] == said("It is")
