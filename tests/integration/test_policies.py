"""While a turn runs: who waits, who is refused, who goes first, and what a change of the record does."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest

from tests.integration.test_http_chat import STALL, Chat, Stream, says
from tests.integration.test_http_server import HttpServer, Json, problem
from tests.modelserver import ModelServer

DEPTH = 3


def settings_for(models: ModelServer, **more: object) -> Json:
    return {
        "model_provider": "openai",
        "openai_api_key": "sk-test",
        "openai_base_url": models.base_url,
        "openai_models": ("*",),
        "session_queue_depth": DEPTH,
        **more,
    }


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture(scope="module")
def server(models: ModelServer) -> Iterator[HttpServer]:
    with HttpServer(**settings_for(models)) as running:
        yield running


@pytest.fixture
def chat(server: HttpServer, models: ModelServer) -> Iterator[Chat]:
    """A chat whose session ``s`` is new."""
    models.reset()
    server.client.delete("/sessions/s")
    moves = Chat(server, models)
    yield moves
    moves.close()


def begin(chat: Chat, response: object) -> tuple[Stream, str]:
    """Return the stream of a turn that has said something, and the turn's id."""
    stream = Stream(response)  # type: ignore[arg-type]
    turn_id = stream.next()["turn_id"]
    assert stream.next()["type"] == "text.delta"
    return stream, turn_id


def history(chat: Chat, session_id: str = "s") -> list[str]:
    found = chat.client.get(f"/sessions/{session_id}/history?limit=200").json()["messages"]
    return [message["content"] for message in found]


def asked(chat: Chat) -> list[str]:
    """Return the last user message of each completion that the model was asked for."""
    return [body["messages"][-1]["content"] for body in chat.models.requests()]


@pytest.mark.parametrize("on_busy", ["interrupt", "rollback"])
@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
def test_an_interrupter_is_served_next(chat: Chat, on_busy: str, path: str) -> None:
    """The running turn ends, its text kept or not; who waits stays and runs after the interrupter."""
    with chat.stream(STALL) as response:
        stream, turn_id = begin(chat, response)
        waiting = chat.saying(says("waiting"))
        chat.until_waiting(1)
        body = {"session_id": "s", "message": says("urgent"), "on_busy": on_busy}
        urgent = chat.client.post(path, json=body)
        end = stream.rest()[-1]
    assert urgent.status_code == 200
    kept = on_busy == "interrupt"
    assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", on_busy, kept)
    assert end["head"] == (turn_id if kept else None)
    assert waiting.result(10).json()["turn_count"] == (3 if kept else 2)
    first = [STALL, "part"] if kept else []
    assert [text[:4] if text != STALL else text for text in history(chat)] == [
        *first, says("urgent")[:4], "urge", says("waiting")[:4], "wait"
    ]  # fmt: skip
    status = chat.client.get(f"/sessions/s/turns/{turn_id}").json()["status"]
    assert status == "cancelled"


def test_an_interrupted_plain_chat(chat: Chat) -> None:
    """Its own client is told 409 ``TURN_CANCELLED``."""
    running = chat.saying(STALL)
    chat.until(lambda: chat.active().get("turn_id"))
    assert chat.say(says("urgent"), on_busy="rollback").json()["turn_count"] == 1
    problem(running.result(10), 409, "TURN_CANCELLED")


def test_an_interrupter_of_an_idle_session_is_an_ordinary_turn(chat: Chat) -> None:
    """With nothing to interrupt it simply runs."""
    assert chat.say(says("a"), on_busy="interrupt").json()["turn_count"] == 1
    assert chat.say(says("b"), on_busy="rollback").json()["turn_count"] == 2


@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
def test_reject_names_the_running_turn(chat: Chat, path: str) -> None:
    """409 ``SESSION_BUSY`` at once, as an ordinary error on the stream's route, too."""
    with chat.stream(STALL) as response:
        stream, turn_id = begin(chat, response)
        body = {"session_id": "s", "message": "x", "on_busy": "reject"}
        assert problem(chat.client.post(path, json=body), 409, "SESSION_BUSY")["turn_id"] == turn_id
        chat.client.post("/sessions/s/cancel")
        assert stream.rest()[-1]["type"] == "turn.cancelled"
    assert chat.say(says("free"), on_busy="reject").status_code == 200


def test_the_queue_is_as_deep_as_configured_and_in_order(chat: Chat) -> None:
    """Exactly ``SESSION_QUEUE_DEPTH`` turns wait, served as they came; an interrupter enters even then."""
    with chat.stream(STALL) as response:
        begin(chat, response)
        waiting = []
        for number in range(DEPTH):
            waiting.append(chat.saying(says(f"turn {number}")))
            ids = chat.until_waiting(number + 1)
        full = chat.say("one too many")
        problem(full, 429, "TURN_QUEUE_FULL")
        assert chat.active()["waiting"] == ids
        urgent = chat.say(says("urgent"), on_busy="rollback").json()
    answers = [each.result(10).json() for each in waiting]
    assert [answer["turn_id"] for answer in answers] == ids
    assert [answer["turn_count"] for answer in (urgent, *answers)] == [1, 2, 3, 4]
    assert "one too many" not in asked(chat)


def test_without_a_queue_nobody_waits(models: ModelServer) -> None:
    """``SESSION_QUEUE_DEPTH=0``: a second turn is refused, but an interrupter is not."""
    with HttpServer(**settings_for(models, session_queue_depth=0)) as server:
        chat = Chat(server, models)
        with chat.stream(STALL) as response:
            begin(chat, response)
            problem(chat.say("x"), 429, "TURN_QUEUE_FULL")
            assert chat.say(says("urgent"), on_busy="interrupt").json()["turn_count"] == 2
        chat.close()


def test_the_wait_has_an_end(models: ModelServer) -> None:
    """After ``SESSION_QUEUE_WAIT_S`` a waiting turn is refused; the running one does not notice."""
    with HttpServer(**settings_for(models, session_queue_wait_s=0.2)) as server:
        chat = Chat(server, models)
        with chat.stream(STALL) as response:
            stream, turn_id = begin(chat, response)
            began = time.monotonic()
            problem(chat.say("x"), 429, "TURN_QUEUE_FULL")
            assert 0.15 < time.monotonic() - began < 5
            assert chat.active()["turn_id"] == turn_id
            chat.client.post("/sessions/s/cancel")
            assert stream.rest()[-1]["type"] == "turn.cancelled"
        chat.close()


def test_a_change_of_the_record_does_not_wait(chat: Chat) -> None:
    """Title and metadata change while a turn runs; provider, model and params count for the next one."""
    with chat.stream(STALL) as response:
        begin(chat, response)
        waiting = chat.saying(says("waiting"))
        chat.until_waiting(1)
        change = {
            "title": "new",
            "metadata": {"a": 1},
            "provider": "openai",
            "model": "m-2",
            "params": {"temperature": 0.5},
        }
        assert chat.client.patch("/sessions/s", json=change).json()["title"] == "new"
        assert chat.active()["status"] == "running"
        assert chat.client.get("/sessions/s").json()["message_count"] == 0
        chat.client.post("/sessions/s/cancel", json={"keep_partial": False})
        assert waiting.result(10).json()["model"] == "m-2"
    first, second = chat.models.requests()
    assert first["model"] != "m-2"
    assert (second["model"], second["temperature"]) == ("m-2", 0.5)
    session = chat.client.get("/sessions/s").json()
    assert (session["title"], session["metadata"]) == ("new", {"a": 1})


def test_a_waiting_turns_own_choice_counts_when_it_starts(chat: Chat) -> None:
    """What a turn asked for is what it gets, whatever was chosen while it waited."""
    chat.say(says("first"), model="m-1")
    with chat.stream(STALL) as response:
        begin(chat, response)
        waiting = chat.saying(says("waiting"), model="m-1")
        chat.until_waiting(1)
        chat.client.patch("/sessions/s", json={"model": "m-2"})
        chat.client.post("/sessions/s/cancel", json={"keep_partial": False})
        assert waiting.result(10).json()["model"] == "m-1"
    assert chat.client.get("/sessions/s").json()["model"] == "m-1"


def test_archiving(chat: Chat) -> None:
    """The running turn ends and commits; those that wait, and those that come, are refused."""
    with chat.stream(says("the whole answer", delay_s=0.2)) as response:
        stream, turn_id = begin(chat, response)
        waiting = [chat.saying("x"), chat.saying("y", on_busy="queue")]
        chat.until_waiting(2)
        assert chat.client.patch("/sessions/s", json={"status": "archived"}).json()["status"] == "archived"
        end = stream.rest()[-1]
    assert (end["type"], end["reply"]) == ("turn.finished", "the whole answer")
    for each in waiting:
        problem(each.result(10), 409, "SESSION_ARCHIVED")
    problem(chat.say("z", on_busy="interrupt"), 409, "SESSION_ARCHIVED")
    session = chat.client.get("/sessions/s").json()
    assert (session["status"], session["head"], session["turn_count"]) == ("archived", turn_id, 1)


def test_deleting_with_turns_that_wait(chat: Chat) -> None:
    """All of them get 404 and none makes the session anew; one of the same id is another session."""
    with chat.stream(STALL) as response:
        stream, _ = begin(chat, response)
        waiting = []
        for number in range(DEPTH):
            waiting.append(chat.saying(says("waiting")))
            chat.until_waiting(number + 1)
        assert chat.client.delete("/sessions/s").status_code == 200
        assert chat.client.post("/sessions", json={"session_id": "s", "title": "mine"}).status_code == 201
        end = stream.rest()[-1]
    assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "deleted", False)
    for each in waiting:
        problem(each.result(10), 404, "SESSION_NOT_FOUND")
    session = chat.client.get("/sessions/s").json()
    assert (session["title"], session["turn_count"]) == ("mine", 0)
    assert chat.client.get("/sessions/s/turns").json()["turns"] == []
    assert asked(chat) == [STALL]
    assert chat.say(says("first")).json()["turn_count"] == 1


def test_forcing_out_the_agent(chat: Chat) -> None:
    """The running turn is cancelled as ``admin`` and leaves no trace; who waits goes on with a new agent."""
    chat.say(says("before"))
    with chat.stream(STALL) as response:
        stream, _ = begin(chat, response)
        waiting = chat.saying(says("waiting"))
        chat.until_waiting(1)
        assert chat.client.delete("/agent-sessions/s?force=true").status_code == 200
        end = stream.rest()[-1]
    assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "admin", False)
    answer = waiting.result(10).json()
    assert (answer["activation"], answer["turn_count"]) == ("restored", 2)
    assert "partial" not in json.dumps(history(chat))


def test_a_turn_that_ends_with_its_client(chat: Chat) -> None:
    """With ``on_disconnect=cancel`` it ends two seconds after the last watcher left, its text kept."""
    with chat.stream(STALL, on_disconnect="cancel") as response:
        _, turn_id = begin(chat, response)
    with chat.watch(turn_id) as again:
        end = Stream(again)
        end.next()
    left = time.monotonic()
    turn = chat.until(lambda: chat.client.get(f"/sessions/s/turns/{turn_id}").json()["status"] != "running")
    assert turn
    assert 1.5 < time.monotonic() - left < 6
    with chat.watch(turn_id) as late:
        end = Stream(late).rest()[-1]
    assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "disconnect", True)


def test_a_hundred_at_once_never_interleave(models: ModelServer) -> None:
    """A hundred messages sent together to one session: each turn saw all before it and nothing else."""
    models.reset()
    names = [says(f"answer {number}") for number in range(100)]
    settings = settings_for(models, session_queue_depth=100, session_queue_wait_s=100)
    with HttpServer(**settings) as server, ThreadPoolExecutor(100) as threads:
        calls = [
            threads.submit(server.client.post, "/chat", json={"session_id": "s", "message": name}, timeout=60)
            for name in names
        ]
        answers = [call.result().json() for call in as_completed(calls)]
        found = server.client.get("/sessions/s/history?limit=200").json()["messages"]
    assert {answer.get("code") for answer in answers} == {None}
    assert sorted(answer["turn_count"] for answer in answers) == list(range(1, 101))
    assert [message["role"] for message in found] == ["user", "assistant"] * 100
    texts = [message["content"] for message in found]
    assert sorted(texts[::2]) == sorted(names)
    assert texts[1::2] == [json.loads(text[2:-2])["text"] for text in texts[::2]]
    for turn, body in enumerate(models.requests()):
        seen = [message["content"] for message in body["messages"] if message["role"] != "system"]
        assert seen == texts[: 2 * turn + 1]
