"""Chat over HTTP: answers, streams, watching again, queueing, cancelling, leaving."""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from app.config import Settings
from app.runtime import Runtime
from tests.integration.test_http_server import HttpServer, Json, problem, serving
from tests.modelserver import ModelServer

STALL = '[[{"mode": "stall_mid", "text": "partial"}]]'


def says(text: str, **step: Any) -> str:
    """Return a message that makes the model say ``text``."""
    return f"[[{json.dumps({'mode': 'text', 'text': text, **step})}]]"


class Stream:
    """One open event stream, read event by event."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self._lines = response.iter_lines()

    def next(self) -> Json:
        """Return the next event, having checked that its three parts agree."""
        fields: dict[str, str] = {}
        for line in self._lines:
            if not line and "data" in fields:
                event: Json = json.loads(fields["data"])
                assert fields["event"] == event["type"]
                assert fields["id"] == f"{event['turn_id']}:{event['seq']}"
                return event
            name, _, value = line.partition(": ")
            if name in ("id", "event", "data"):
                assert name not in fields
                fields[name] = value
        raise EOFError

    def rest(self) -> list[Json]:
        events = []
        while True:
            try:
                events.append(self.next())
            except EOFError:
                return events


class Chat:
    """A server whose model does what messages tell it, and the moves that tests make."""

    def __init__(self, server: HttpServer, models: ModelServer) -> None:
        self.server = server
        self.models = models
        self.client = server.client
        self._threads = ThreadPoolExecutor(8)

    def say(self, message: str = "hello", session_id: str = "s", **more: Any) -> httpx2.Response:
        return self.client.post("/chat", json={"session_id": session_id, "message": message, **more})

    def saying(self, message: str = "hello", **more: Any) -> "Future[httpx2.Response]":
        return self._threads.submit(self.say, message, **more)

    def stream(self, message: str = "hello", session_id: str = "s", **more: Any) -> Any:
        body = {"session_id": session_id, "message": message, **more}
        return self.client.stream("POST", "/chat/stream", json=body)

    def watch(
        self, turn_id: str, after: int | None = None, last: str | None = None, session: str = "s"
    ) -> Any:
        headers = {} if last is None else {"Last-Event-ID": last}
        params = {} if after is None else {"after": after}
        path = f"/sessions/{session}/turns/{turn_id}/stream"
        return self.client.stream("GET", path, params=params, headers=headers)

    def active(self, session_id: str = "s") -> Json:
        document: Json = self.client.get(f"/sessions/{session_id}/turns/active").json()
        return document

    def until(self, done: Callable[[], Any]) -> Any:
        """Ask again until the answer is true; each question is a round trip to the server."""
        for _ in range(5000):
            if answer := done():
                return answer
        raise AssertionError("it never happened")

    def until_waiting(self, count: int) -> list[str]:
        def waiting() -> list[str]:
            ids: list[str] = self.active().get("waiting", [])
            return ids if len(ids) == count else []

        found: list[str] = self.until(waiting)
        return found

    def close(self) -> None:
        self._threads.shutdown()


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture
def chat(models: ModelServer) -> Iterator[Chat]:
    models.reset()
    settings = {
        "model_provider": "openai",
        "openai_api_key": "sk-test",
        "openai_base_url": models.base_url,
        "openai_models": ("*",),
        "session_queue_depth": 2,
        "agent_max_instances": 8,
    }
    with HttpServer(**settings) as server:
        moves = Chat(server, models)
        yield moves
        moves.close()


def test_an_answer(chat: Chat) -> None:
    """All members of the contract; the ids are in the headers, too."""
    response = chat.say(says("你好张三！"))
    answer = response.json()
    assert list(answer) == [
        "session_id",
        "turn_id",
        "head",
        "reply",
        "finish_reason",
        "provider",
        "model",
        "agent_id",
        "usage",
        "message_count",
        "turn_count",
        "activation",
        "queued_ms",
        "duration_ms",
        "created_at",
    ]
    assert answer["reply"] == "你好张三！"
    assert (answer["head"], answer["finish_reason"], answer["activation"]) == (
        answer["turn_id"],
        "stop",
        "new",
    )
    assert (answer["message_count"], answer["turn_count"]) == (2, 1)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert response.headers["x-session-id"] == "s"
    assert response.headers["x-turn-id"] == answer["turn_id"]
    assert chat.say().json()["activation"] == "warm"


def test_a_generated_session(chat: Chat) -> None:
    """Without an id there is a new session, titled by the message and with what was given."""
    body = {"message": "x" * 60, "window_id": "w", "metadata": {"token": "t"}, "session_id": ""}
    session_id = chat.client.post("/chat", json=body).json()["session_id"]
    session = chat.client.get(f"/sessions/{session_id}").json()
    assert session["title"] == "x" * 40
    assert (session["window_id"], session["metadata"]) == ("w", {"token": "[redacted]"})


def test_choices_stick(chat: Chat) -> None:
    """A model and parameters given once count for the next turn, too, and move the tag."""
    chat.say(model_name="m-1", params={"temperature": 0.5})
    chat.say()
    asked = chat.models.requests()
    assert [(body["model"], body["temperature"]) for body in asked] == [("m-1", 0.5)] * 2
    assert chat.client.get("/sessions/s").json()["params"] == {"temperature": 0.5}


def test_a_stream(chat: Chat) -> None:
    """The events of a plain turn, numbered from 1; the deltas make the message; the end is stored."""
    with chat.stream(says("one two three four")) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        events = Stream(response).rest()
    kinds = [event["type"] for event in events]
    assert kinds[0] == "turn.started"
    assert kinds[-2:] == ["message.completed", "turn.finished"]
    assert set(kinds[1:-2]) == {"text.delta"}
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert {event["turn_id"] for event in events} == {response.headers["x-turn-id"]}
    text = "".join(event["text"] for event in events if event["type"] == "text.delta")
    assert text == events[-2]["text"] == events[-1]["reply"] == "one two three four"
    session = chat.client.get("/sessions/s").json()
    assert session["head"] == events[-1]["head"]
    assert session["message_count"] == events[-1]["message_count"]
    assert chat.client.get("/agent-stats").json()["active_agents"] == 0


def test_events_come_while_the_model_works(chat: Chat) -> None:
    """The first words are there before the last are said."""
    with chat.stream(STALL) as response:
        stream = Stream(response)
        assert stream.next()["type"] == "turn.started"
        assert stream.next()["text"]
        assert chat.active()["turn_id"] == response.headers["x-turn-id"]
        chat.client.post("/sessions/s/cancel")
        assert stream.rest()[-1]["type"] == "turn.cancelled"


def test_a_failure_in_a_stream_and_in_an_answer(chat: Chat) -> None:
    """After the start it is ``turn.failed`` with the members of the problem that ``/chat`` answers."""
    chat.models.script({"mode": "status", "status": 400, "repeat": 2})
    with chat.stream() as response:
        assert response.status_code == 200
        failed = Stream(response).rest()[-1]
    plain = problem(chat.say(), 502, "MODEL_ERROR")
    assert failed["type"] == "turn.failed"
    assert failed["problem_type"] == plain["type"]
    assert failed["request_id"] == response.headers["x-request-id"]
    assert failed["instance"] == "/chat/stream"
    for name in ("title", "status", "code", "session_id"):
        assert failed[name] == plain[name]
    assert plain["turn_id"]
    assert "sk-test" not in json.dumps([failed, plain])
    assert chat.client.get("/sessions/s").json()["message_count"] == 0
    assert [turn["status"] for turn in chat.client.get("/sessions/s/turns").json()["turns"]] == ["failed"] * 2


def test_an_upstream_limit_is_passed_on(chat: Chat) -> None:
    """429 with the provider's own ``Retry-After``."""
    chat.models.script({"mode": "status", "status": 429, "retry_after": 77, "repeat": 9})
    response = chat.say()
    problem(response, 429, "MODEL_RATE_LIMITED")
    assert response.headers["retry-after"] == "77"
    assert response.headers["x-turn-id"]


def test_a_refusal_before_the_start_is_an_ordinary_error(chat: Chat) -> None:
    """The stream's route answers with a problem document, not with a stream."""
    chat.client.post("/sessions", json={"session_id": "s"})
    chat.client.patch("/sessions/s", json={"status": "archived"})
    for path in ("/chat", "/chat/stream"):
        response = chat.client.post(path, json={"session_id": "s", "message": "x"})
        assert problem(response, 409, "SESSION_ARCHIVED")["session_id"] == "s"
        assert "x-turn-id" not in response.headers


def test_watching_a_finished_turn_again(chat: Chat) -> None:
    """From any position what follows, and 204 when nothing does."""
    with chat.stream(says("a b c d")) as response:
        events = Stream(response).rest()
    turn_id, last = events[0]["turn_id"], events[-1]["seq"]
    for after in range(last):
        with chat.watch(turn_id, after=after) as again:
            assert Stream(again).rest() == events[after:]
        with chat.watch(turn_id, last=f"{turn_id}:{after}") as again:
            assert Stream(again).rest() == events[after:]
            assert (again.headers["x-session-id"], again.headers["x-turn-id"]) == ("s", turn_id)
    with chat.watch(turn_id) as again:
        assert Stream(again).rest() == events
    with chat.watch(turn_id, after=0, last=f"{turn_id}:{last}") as again:
        assert again.status_code == 204


def test_watching_from_the_store(models: ModelServer) -> None:
    """When the log is gone: everything with one delta, or the whole message and the end, never text twice."""
    settings = {"model_provider": "openai", "openai_api_key": "k", "openai_base_url": models.base_url}
    with HttpServer(**settings, stream_replay_bytes=0) as server:
        chat = Chat(server, models)
        with chat.stream(says("a b c d")) as response:
            events = Stream(response).rest()
        turn_id, last = events[0]["turn_id"], events[-1]["seq"]
        with chat.watch(turn_id, after=0) as again:
            stored = Stream(again).rest()
        kinds = ["turn.started", "text.delta", "message.completed", "turn.finished"]
        assert [event["type"] for event in stored] == kinds
        assert stored[1]["text"] == "a b c d"
        assert stored[-2:] == events[-2:]
        with chat.watch(turn_id, after=1) as again:
            assert Stream(again).rest() == events[-2:]
        with chat.watch(turn_id, after=last - 1) as again:
            assert Stream(again).rest() == events[-1:]
        with chat.watch(turn_id, after=last) as again:
            assert again.status_code == 204
        chat.close()


def test_many_watchers_see_the_same(chat: Chat) -> None:
    """All who watch a turn get the same events, from wherever they began."""
    with chat.stream(STALL) as first:
        stream = Stream(first)
        started = stream.next()
        stream.next()
        with chat.watch(started["turn_id"]) as second, chat.watch(started["turn_id"], after=1) as third:
            others = [Stream(second), Stream(third)]
            assert others[0].next() == started
            chat.client.post("/sessions/s/cancel")
            ends = [one.rest()[-1] for one in (stream, *others)]
    assert ends[0]["type"] == "turn.cancelled"
    assert ends[0] == ends[1] == ends[2]


def test_a_turn_outlives_its_client(chat: Chat) -> None:
    """A closed stream changes nothing: the turn finishes, is stored, and can be watched."""
    with chat.stream(says("a b c d", delay_s=0.05)) as response:
        turn_id = Stream(response).next()["turn_id"]
    with chat.watch(turn_id) as again:
        assert Stream(again).rest()[-1]["type"] == "turn.finished"
    assert chat.client.get("/sessions/s").json()["head"] == turn_id


def test_turns_wait_in_order(chat: Chat) -> None:
    """FIFO, at most as deep as configured; ``reject`` does not wait and names the turn that runs."""
    with chat.stream(STALL) as response:
        running = Stream(response).next()["turn_id"]
        second = chat.saying(says("second"))
        chat.until_waiting(1)
        third = chat.saying(says("third"))
        chat.until_waiting(2)
        full = chat.say("one too many")
        problem(full, 429, "TURN_QUEUE_FULL")
        assert full.headers["x-session-id"] == "s"
        assert full.headers["x-turn-id"] not in (running, None)
        busy = problem(chat.say(on_busy="reject"), 409, "SESSION_BUSY")
        assert busy["turn_id"] == running
        active = chat.active()
        assert (active["turn_id"], active["status"]) == (running, "running")
        assert chat.client.post("/sessions/s/cancel", json={"keep_partial": False}).status_code == 202
        replies = [second.result(10).json(), third.result(10).json()]
    assert [reply["reply"] for reply in replies] == ["second", "third"]
    assert [reply["turn_count"] for reply in replies] == [1, 2]
    assert replies[1]["queued_ms"] > 0
    problem(chat.client.get("/sessions/s/turns/active"), 404, "NO_ACTIVE_TURN")


@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
def test_a_waiting_turn_is_dropped_when_its_client_leaves(chat: Chat, path: str) -> None:
    """Nobody waits for it: it never runs, and those behind it move up."""
    body = json.dumps({"session_id": "s", "message": "never"}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with chat.stream(STALL) as response:
        Stream(response).next()
        with socket.create_connection(("127.0.0.1", chat.server.port)) as leaving:
            leaving.sendall(head.encode() + body)
            chat.until_waiting(1)
            behind = chat.saying(says("behind"))
            chat.until_waiting(2)
        chat.until_waiting(1)
        chat.client.post("/sessions/s/cancel", json={"keep_partial": False})
        assert behind.result(10).json()["turn_count"] == 1
    assert "never" not in json.dumps(chat.models.requests())


def test_a_running_turn_goes_on_when_its_client_leaves(chat: Chat) -> None:
    """A plain chat whose client has gone is finished and stored as any other."""
    body = json.dumps({"session_id": "s", "message": says("done", first_s=0.1)}).encode()
    head = "POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", chat.server.port)) as leaving:
        leaving.sendall(head.encode() + body)
        chat.until(lambda: chat.active().get("turn_id"))
    chat.until(lambda: chat.client.get("/sessions/s").json()["message_count"] == 2)
    assert chat.client.get("/sessions/s/history").json()["messages"][1]["content"] == "done"


def test_cancelling_with_the_partial_kept(chat: Chat) -> None:
    """The text so far stays, marked; the head moves to it."""
    with chat.stream(STALL) as response:
        stream = Stream(response)
        turn_id = stream.next()["turn_id"]
        text = stream.next()["text"]
        cancelled = chat.client.post("/sessions/s/cancel")
        assert (cancelled.status_code, cancelled.json()) == (202, {"turn_id": turn_id})
        end = stream.rest()[-1]
    assert (end["type"], end["reason"], end["partial_kept"], end["head"]) == (
        "turn.cancelled",
        "user",
        True,
        turn_id,
    )
    assert end["message_count"] == 2
    answer = chat.client.get("/sessions/s/history").json()["messages"][1]
    assert answer["interrupted"] is True
    assert answer["content"].startswith(text)


def test_cancelling_a_plain_chat(chat: Chat) -> None:
    """Its answer is 409 with the turn's id; with the partial dropped there is no trace."""
    asked = chat.saying(STALL)
    turn_id = chat.until(lambda: chat.active().get("turn_id"))
    chat.client.post("/sessions/s/cancel", json={"keep_partial": False})
    response = asked.result(10)
    assert problem(response, 409, "TURN_CANCELLED")["turn_id"] == turn_id
    assert response.headers["x-turn-id"] == turn_id
    assert chat.client.get("/sessions/s/history").json()["messages"] == []


def test_cancelling_a_waiting_turn_and_all(chat: Chat) -> None:
    """A waiting turn can be named; ``all`` ends everything."""
    with chat.stream(STALL) as response:
        stream = Stream(response)
        stream.next()
        second = chat.saying("second")
        (waiting,) = chat.until_waiting(1)
        assert chat.client.post("/sessions/s/cancel", json={"turn_id": waiting}).json() == {
            "turn_id": waiting
        }
        problem(second.result(10), 409, "TURN_CANCELLED")
        third = chat.saying("third")
        chat.until_waiting(1)
        assert chat.client.post("/sessions/s/cancel", json={"all": True}).status_code == 202
        assert stream.rest()[-1]["type"] == "turn.cancelled"
        problem(third.result(10), 409, "TURN_CANCELLED")
    problem(chat.client.post("/sessions/s/cancel"), 409, "NO_ACTIVE_TURN")
    stranger = {"turn_id": "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"}
    problem(chat.client.post("/sessions/s/cancel", json=stranger), 404, "TURN_NOT_FOUND")
    problem(chat.client.post("/sessions/s/cancel", json={"keep_partial": 0}), 422, "VALIDATION_ERROR")


def test_deleting_a_session_in_use(chat: Chat) -> None:
    """The running turn is cancelled as ``deleted``, waiting ones are refused, nothing makes it anew."""
    with chat.stream(STALL) as response:
        stream = Stream(response)
        stream.next()
        waiting = chat.saying("waiting")
        chat.until_waiting(1)
        assert chat.client.delete("/sessions/s").status_code == 200
        end = stream.rest()[-1]
    assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "deleted", False)
    problem(waiting.result(10), 404, "SESSION_NOT_FOUND")
    problem(chat.client.get("/sessions/s"), 404, "SESSION_NOT_FOUND")


def test_evicting_a_busy_agent(chat: Chat) -> None:
    """Refused with the turn's id, unless forced; then the turn ends as ``admin``, not kept."""
    with chat.stream(STALL) as response:
        stream = Stream(response)
        turn_id = stream.next()["turn_id"]
        assert problem(chat.client.delete("/agent-sessions/s"), 409, "SESSION_BUSY")["turn_id"] == turn_id
        assert chat.client.delete("/agent-sessions/s?force=true").status_code == 200
        end = stream.rest()[-1]
    assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "admin", False)


def test_a_silent_stream_says_that_it_lives(models: ModelServer) -> None:
    """A comment comes when nothing else does; clients ignore it."""
    settings = {"model_provider": "openai", "openai_api_key": "k", "openai_base_url": models.base_url}
    with HttpServer(**settings, stream_heartbeat_s=0.05) as server:
        body = {"session_id": "s", "message": STALL}
        with server.client.stream("POST", "/chat/stream", json=body) as response:
            comments = [line for line, _ in zip(_comments(response), range(3), strict=False)]
        assert len(comments) == 3
        server.client.post("/sessions/s/cancel")


def test_leaving_watchers_leave_nothing(chat: Chat) -> None:
    """A hundred watchers that come and go leave no task behind, and the turn does not notice."""

    def tasks() -> int:
        asked: Future[int] = Future()
        loop = chat.server.loop
        loop.call_soon_threadsafe(lambda: asked.set_result(len(asyncio.all_tasks(loop))))
        return asked.result(5)

    with chat.stream(STALL) as response:
        stream = Stream(response)
        turn_id = stream.next()["turn_id"]
        before = tasks()
        for _ in range(100):
            with chat.watch(turn_id) as again:
                Stream(again).next()
        chat.until(lambda: tasks() <= before)
        chat.client.post("/sessions/s/cancel")
        assert stream.rest()[-1]["type"] == "turn.cancelled"


def test_sessions_do_not_wait_for_each_other(chat: Chat) -> None:
    """While one session's model is silent, another session answers."""
    with chat.stream(STALL) as response:
        Stream(response).next()
        assert chat.say(says("quick"), session_id="t").json()["reply"] == "quick"
        assert problem(chat.say(session_id="s", on_busy="reject"), 409, "SESSION_BUSY")
        chat.client.post("/sessions/s/cancel")


def _comments(response: httpx2.Response) -> Iterator[str]:
    return (line for line in response.iter_lines() if line.startswith(":"))


def test_draining(models: ModelServer) -> None:
    """New and waiting turns are refused at once, running ones go on until they are cancelled as ``drain``."""
    settings = {"model_provider": "openai", "openai_api_key": "k", "openai_base_url": models.base_url}
    runtime = Runtime(Settings(store_url="memory://", **settings))

    async def cancel() -> None:
        await runtime.cancel_turns()

    with HttpServer(serving(runtime)) as server:
        chat = Chat(server, models)
        plain = chat.saying(STALL, session_id="t")
        chat.until(lambda: chat.active("t").get("turn_id"))
        with chat.stream(STALL) as response:
            stream = Stream(response)
            assert [stream.next()["type"], stream.next()["type"]] == ["turn.started", "text.delta"]
            waiting = chat.saying("waiting")
            chat.until_waiting(1)
            server.loop.call_soon_threadsafe(runtime.begin_drain)
            problem(waiting.result(10), 503, "DRAINING")
            problem(chat.say("new", session_id="u"), 503, "DRAINING")
            problem(chat.client.get("/ready"), 503, "DRAINING")
            assert chat.client.get("/health").json()["status"] == "healthy"
            assert chat.client.get("/agent-stats").json()["draining"] is True
            assert chat.active()["status"] == "running"
            asyncio.run_coroutine_threadsafe(cancel(), server.loop).result(10)
            end = stream.rest()[-1]
        assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "drain", True)
        document = problem(plain.result(10), 503, "DRAINING")
        assert document["session_id"] == "t"
        assert document["turn_id"]
        chat.close()
