"""The same request sent again with its ``Idempotency-Key``: one turn, and the same answer every time."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from tests.integration.test_http_chat import STALL, Chat, Stream, says
from tests.integration.test_http_server import HttpServer, Json, problem
from tests.modelserver import ModelServer

HELLO = says("hello yourself", delay_s=0.05)


def settings_for(models: ModelServer, **more: object) -> Json:
    return {
        "model_provider": "openai",
        "openai_api_key": "sk-test",
        "openai_base_url": models.base_url,
        "openai_models": ("*",),
        **more,
    }


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture(scope="module", params=[64 << 20, 0], ids=["log", "store"])
def server(models: ModelServer, request: pytest.FixtureRequest) -> Iterator[HttpServer]:
    """Repeats are the same whether the log of the turn is still there or only the stored turn."""
    with HttpServer(**settings_for(models, stream_replay_bytes=request.param)) as running:
        yield running


@pytest.fixture
def chat(server: HttpServer, models: ModelServer) -> Iterator["KeyedChat"]:
    models.reset()
    server.client.delete("/sessions/s")
    moves = KeyedChat(server, models)
    yield moves
    moves.close()


class KeyedChat(Chat):
    """Every message goes with the key ``k``; it is free at the beginning, as session ``s`` is new."""

    def ask(self, message: str = HELLO, path: str = "/chat", key: str = "k", **more: Any) -> httpx2.Response:
        body = {"session_id": "s", "message": message, **more}
        return self.client.post(path, json=body, headers={"Idempotency-Key": key})

    def asking(self, message: str, **more: Any) -> Any:
        return self._threads.submit(self.ask, message, **more)

    def open(self, message: str, **more: Any) -> Any:
        body = {"session_id": "s", "message": message, **more}
        headers = {"Idempotency-Key": "k"}
        return self.client.stream("POST", "/chat/stream", json=body, headers=headers)

    def count(self) -> int:
        return len(self.models.requests())


def events_of(response: httpx2.Response) -> list[Json]:
    lines = response.text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def text_of(events: list[Json]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "text.delta")


def test_twenty_at_once_and_one_later(chat: KeyedChat) -> None:
    """Whichever way they come, the model is called once and all answers are the same."""
    paths = ["/chat", "/chat/stream"] * 10
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda path: chat.ask(path=path), paths))
    answers += [chat.ask(path="/chat"), chat.ask(path="/chat/stream")]
    assert {answer.status_code for answer in answers} == {200}
    assert chat.count() == 1
    plain = [answer.json() for answer in answers if "json" in answer.headers["content-type"]]
    assert all(answer == plain[0] for answer in plain)
    streams = [events_of(answer) for answer in answers if "json" not in answer.headers["content-type"]]
    assert len(plain) == len(streams) == 11
    for events in streams:
        assert events[0] == streams[0][0]
        assert events[-1] == streams[0][-1]
        assert text_of(events) == events[-2]["text"] == events[-1]["reply"] == plain[0]["reply"]
    for name in ("reply", "head", "usage", "message_count", "turn_count", "queued_ms", "duration_ms"):
        assert streams[0][-1][name] == plain[0][name]
    for answer in answers:
        assert answer.headers["x-turn-id"] == plain[0]["turn_id"]
        assert answer.headers["x-session-id"] == "s"


@pytest.mark.parametrize(
    "other",
    [
        {"message": "another"},
        {"session_id": "t"},
        {"session_id": None},
        {"provider": "openai"},
        {"model": "m-1"},
        {"agent_id": "assistant"},
        {"params": {"seed": 1}},
        {"metadata": {"a": 1}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_request(chat: KeyedChat, other: Json) -> None:
    """Another body with the key is 422 while the turn runs and afterwards, and makes no turn."""
    with chat.open(HELLO) as response:
        stream = Stream(response)
        stream.next()
        problem(chat.ask(**{"message": HELLO, **other}), 422, "IDEMPOTENCY_MISMATCH")
        stream.rest()
    problem(chat.ask(**{"message": HELLO, **other}), 422, "IDEMPOTENCY_MISMATCH")
    assert chat.count() == 1


def test_what_is_not_compared(chat: KeyedChat) -> None:
    """``on_busy``, ``on_disconnect`` and the route make no other request of it."""
    first = chat.ask().json()
    for more in ({"on_busy": "reject"}, {"on_busy": "interrupt"}, {"on_disconnect": "cancel"}):
        assert chat.ask(**more).json() == first
    assert chat.ask(path="/chat/stream").headers["x-turn-id"] == first["turn_id"]
    assert chat.count() == 1


def test_a_repeat_does_not_interrupt_its_own_turn(chat: KeyedChat) -> None:
    """Sent again with ``interrupt`` while it runs, a request joins its turn."""
    with chat.open(HELLO) as response:
        stream = Stream(response)
        turn_id = stream.next()["turn_id"]
        again = chat.ask(on_busy="interrupt")
        assert stream.rest()[-1]["type"] == "turn.finished"
    assert again.json()["turn_id"] == turn_id
    assert chat.count() == 1


def test_a_failed_turn_releases_the_key(chat: KeyedChat) -> None:
    """What failed is tried again with the next repeat, as often as it takes."""
    chat.models.script({"mode": "status", "status": 400, "repeat": 2})
    problem(chat.ask("hello"), 502, "MODEL_ERROR")
    assert events_of(chat.ask("hello", path="/chat/stream"))[-1]["type"] == "turn.failed"
    answer = chat.ask("hello").json()
    assert answer["turn_count"] == 1
    assert chat.ask("hello").json() == answer
    assert chat.count() == 3


def test_a_cancelled_turn_that_was_dropped_releases_the_key(chat: KeyedChat) -> None:
    """It left no trace, so the repeat is a new turn; even another request may have the key."""
    with chat.open(STALL) as response:
        stream = Stream(response)
        first = stream.next()["turn_id"]
        stream.next()
        chat.client.post("/sessions/s/cancel", json={"keep_partial": False})
        stream.rest()
    answer = chat.ask(HELLO).json()
    assert answer["turn_id"] != first
    assert (answer["turn_count"], chat.count()) == (1, 2)


def test_a_cancelled_turn_that_was_kept_is_answered_as_cancelled(chat: KeyedChat) -> None:
    """409 on the plain route, the stored events on the other; the model is not called again."""
    with chat.open(STALL) as response:
        stream = Stream(response)
        events = [stream.next(), stream.next()]
        chat.client.post("/sessions/s/cancel")
        events += stream.rest()
    again = chat.ask(STALL)
    assert problem(again, 409, "TURN_CANCELLED")["turn_id"] == events[0]["turn_id"]
    assert again.headers["x-turn-id"] == events[0]["turn_id"]
    stored = events_of(chat.ask(STALL, path="/chat/stream"))
    assert (stored[0], stored[-1]) == (events[0], events[-1])
    assert text_of(stored) == text_of(events)
    assert chat.count() == 1


def test_a_waiting_turn_that_was_dropped_releases_the_key(chat: KeyedChat) -> None:
    """A turn that never ran because it was cancelled in the queue has bound nothing."""
    with chat.stream(STALL) as response:
        stream = Stream(response)
        stream.next()
        waiting = chat.asking(HELLO)
        (turn_id,) = chat.until_waiting(1)
        chat.client.post("/sessions/s/cancel", json={"turn_id": turn_id})
        problem(waiting.result(10), 409, "TURN_CANCELLED")
        chat.client.post("/sessions/s/cancel", json={"keep_partial": False})
        stream.rest()
    assert chat.ask(HELLO).json()["turn_count"] == 1


def test_without_a_session_the_repeat_finds_the_one_that_was_made(chat: KeyedChat) -> None:
    """A lost answer to a first message does not leave a second session behind."""
    first = chat.ask(key="generated", session_id=None)
    session_id = first.json()["session_id"]
    before = chat.client.get("/sessions").json()["total"]
    for path in ("/chat", "/chat/stream"):
        again = chat.ask(key="generated", session_id=None, path=path)
        assert again.headers["x-session-id"] == session_id
    assert chat.ask(key="generated", session_id="").json() == first.json()
    assert chat.client.get("/sessions").json()["total"] == before
    problem(chat.ask(key="generated", session_id=session_id), 422, "IDEMPOTENCY_MISMATCH")
    chat.client.delete(f"/sessions/{session_id}")


def test_refusals_bind_nothing(chat: KeyedChat) -> None:
    """After 422, 404 and 409 before a turn ran, another request may have the key."""
    problem(chat.ask(params={"temperature": 9}), 422, "VALIDATION_ERROR")
    problem(chat.ask(provider="nobody"), 422, "UNKNOWN_MODEL")
    problem(chat.ask(agent_id="nobody"), 404, "AGENT_NOT_FOUND")
    chat.client.delete("/sessions/s")
    chat.client.post("/sessions", json={"session_id": "s"})
    problem(chat.ask(user_id="somebody"), 404, "SESSION_NOT_FOUND")
    chat.client.patch("/sessions/s", json={"status": "archived"})
    problem(chat.ask(metadata={"a": 1}), 409, "SESSION_ARCHIVED")
    chat.client.patch("/sessions/s", json={"status": "active"})
    with chat.stream(STALL) as response:
        stream = Stream(response)
        stream.next()
        problem(chat.ask("busy", on_busy="reject"), 409, "SESSION_BUSY")
        chat.client.post("/sessions/s/cancel", json={"keep_partial": False})
        stream.rest()
    assert chat.ask().json()["turn_count"] == 1


def test_an_exhausted_pool_binds_nothing(models: ModelServer) -> None:
    """After 503 ``POOL_EXHAUSTED`` and 429 ``TURN_QUEUE_FULL`` another request may have the key."""
    small = {"agent_max_instances": 1, "agent_capacity_wait_s": 0, "session_queue_depth": 0}
    with HttpServer(**settings_for(models, **small)) as server:
        chat = KeyedChat(server, models)
        with chat.stream(STALL, session_id="t") as response:
            stream = Stream(response)
            stream.next()
            problem(chat.ask("x"), 503, "POOL_EXHAUSTED")
            problem(chat.ask("y", session_id="t"), 429, "TURN_QUEUE_FULL")
            chat.client.post("/sessions/t/cancel")
            stream.rest()
        assert chat.ask().status_code == 200
        chat.close()


def test_an_unknown_session_binds_nothing(models: ModelServer) -> None:
    """With ``SESSION_AUTO_CREATE=false`` the key is free until the session is there."""
    with HttpServer(**settings_for(models, session_auto_create=False)) as server:
        chat = KeyedChat(server, models)
        problem(chat.ask("x"), 404, "SESSION_NOT_FOUND")
        chat.client.post("/sessions", json={"session_id": "s"})
        assert chat.ask().status_code == 200
        chat.close()


def test_deleting_the_session_frees_the_key(chat: KeyedChat) -> None:
    """What the key was bound to is gone, so the same request begins anew."""
    first = chat.ask().json()
    chat.client.delete("/sessions/s")
    second = chat.ask().json()
    assert first["turn_id"] != second["turn_id"]
    assert (second["turn_count"], chat.count()) == (1, 2)
