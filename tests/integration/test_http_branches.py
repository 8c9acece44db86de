"""Branches over HTTP: checkpoints, going back, copying, editing, answering anew, summing up."""

import json
from collections.abc import Iterator

import httpx2
import pytest

from tests.integration.test_http_chat import STALL, Chat, Stream, says
from tests.integration.test_http_server import HttpServer, Json, problem
from tests.integration.test_http_sessions import FIELDS, TIME, UUID7
from tests.modelserver import ModelServer

STRANGER = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"
DEPTH = 3
CHECKPOINT = ["checkpoint_id", "turn_id", "label", "data", "created_at", "automatic"]


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture(scope="module")
def server(models: ModelServer) -> Iterator[HttpServer]:
    settings = {
        "model_provider": "openai",
        "openai_api_key": "sk-test",
        "openai_base_url": models.base_url,
        "openai_models": ("*",),
        "session_queue_depth": DEPTH,
    }
    with HttpServer(**settings) as running:
        yield running


@pytest.fixture
def chat(server: HttpServer, models: ModelServer) -> Iterator[Chat]:
    """A chat whose session ``s`` is new."""
    models.reset()
    server.client.delete("/sessions/s")
    server.client.delete("/sessions/copy")
    moves = Chat(server, models)
    yield moves
    moves.close()


@pytest.fixture
def client(chat: Chat) -> httpx2.Client:
    return chat.client


def talk(chat: Chat, *answers: str) -> list[str]:
    """Ask for these answers in session ``s``, and let the model give them; return the ids of the turns."""
    chat.models.script(*({"mode": "text", "text": text} for text in answers))
    return [chat.say(f"{text}?").json()["turn_id"] for text in answers]


def seen(reply: str) -> list[str]:
    """Return what an echoing model was sent, but for the system prompt."""
    texts: list[str] = json.loads(reply)["texts"][1:]
    return texts


def head(chat: Chat, session_id: str = "s") -> str | None:
    found: str | None = chat.client.get(f"/sessions/{session_id}").json()["head"]
    return found


def test_a_checkpoint_names_the_head(chat: Chat) -> None:
    """201 with its path and all members; secrets in its data are not stored."""
    (turn,) = talk(chat, "one")
    body = {"label": "第一步", "data": {"step": 1, "api_key": "k"}}
    response = chat.client.post("/api/sessions/s/checkpoints", json=body)
    made = response.json()
    assert response.status_code == 201
    assert list(made) == CHECKPOINT
    assert UUID7.fullmatch(made["checkpoint_id"])
    assert TIME.fullmatch(made["created_at"])
    assert (made["turn_id"], made["label"], made["automatic"]) == (turn, "第一步", False)
    assert made["data"] == {"step": 1, "api_key": "[redacted]"}
    assert response.headers["location"] == f"/api/sessions/s/checkpoints/{made['checkpoint_id']}"
    assert chat.client.get(response.headers["location"]).json() == made


def test_a_checkpoint_of_nothing(client: httpx2.Client) -> None:
    """No body, or an empty one, and no turn yet: neither label nor data, and the beginning."""
    client.post("/sessions", json={"session_id": "s"})
    for content in ({}, {"json": {}}, {"json": {"label": None, "data": None}}):
        made = client.post("/sessions/s/checkpoints", **content).json()
        assert (made["turn_id"], made["label"], made["data"]) == (None, None, {})


def test_checkpoints_are_listed_newest_first(chat: Chat) -> None:
    """The list pages by cursor; ``latest`` is its first."""
    talk(chat, "one")
    made = [chat.client.post("/sessions/s/checkpoints", json={"label": str(n)}).json() for n in range(5)]
    page = chat.client.get("/sessions/s/checkpoints?limit=3").json()
    rest = chat.client.get(f"/sessions/s/checkpoints?limit=3&cursor={page['next_cursor']}").json()
    assert page["checkpoints"] + rest["checkpoints"] == made[::-1]
    assert (page["total"], rest["total"], rest["next_cursor"]) == (5, 5, None)
    assert chat.client.get("/sessions/s/checkpoints/latest").json() == made[-1]


def test_checkpoints_are_deleted(chat: Chat) -> None:
    """One, or all; their turns stay."""
    (turn,) = talk(chat, "one")
    ids = [chat.client.post("/sessions/s/checkpoints").json()["checkpoint_id"] for _ in range(3)]
    path = f"/sessions/s/checkpoints/{ids[0]}"
    assert chat.client.delete(path).json() == {"message": "Checkpoint deleted", "checkpoint_id": ids[0]}
    for method in ("GET", "DELETE"):
        problem(chat.client.request(method, path), 404, "CHECKPOINT_NOT_FOUND")
    assert chat.client.delete("/sessions/s/checkpoints").json() == {"deleted": 2}
    assert chat.client.get("/sessions/s/checkpoints").json()["checkpoints"] == []
    problem(chat.client.get("/sessions/s/checkpoints/latest"), 404, "CHECKPOINT_NOT_FOUND")
    assert head(chat) == turn


def test_restoring(chat: Chat) -> None:
    """Head, state and what the model is sent are those of the checkpoint; the answer is the session."""
    (turn,) = talk(chat, "one")
    chat.client.patch("/sessions/s/state", json={"state": {"step": 1}})
    checkpoint = chat.client.post("/sessions/s/checkpoints").json()["checkpoint_id"]
    chat.client.patch("/sessions/s/state", json={"state": {"step": 2}})
    talk(chat, "two")
    response = chat.client.post(f"/sessions/s/checkpoints/{checkpoint}/restore")
    session = response.json()
    assert list(session) == FIELDS
    assert (session["head"], session["turn_count"], session["message_count"]) == (turn, 1, 2)
    assert response.headers["etag"].startswith(f'"{turn}.')
    assert response.headers["etag"] == chat.client.get("/sessions/s").headers["etag"]
    assert chat.client.get("/sessions/s/state").json() == {"state": {"step": 1}}
    assert seen(chat.say("again").json()["reply"]) == ["one?", "one", "again"]


def test_rewinding_by_turns(chat: Chat) -> None:
    """Back by some; by all to the beginning; by more: 422 and nothing happens."""
    first, second, third = talk(chat, "one", "two", "three")
    assert chat.client.post("/sessions/s/rewind", json={"turns": 1}).json()["head"] == second
    too_far = problem(chat.client.post("/sessions/s/rewind", json={"turns": 3}), 422, "VALIDATION_ERROR")
    assert too_far["errors"][0]["field"] == "turns"
    assert head(chat) == second
    back = chat.client.post("/sessions/s/rewind", json={"turns": 2}).json()
    assert (back["head"], back["turn_count"]) == (None, 0)
    assert seen(chat.say("anew").json()["reply"]) == ["anew"]
    on_branch = {
        turn["turn_id"]: turn["on_branch"] for turn in chat.client.get("/sessions/s/turns").json()["turns"]
    }
    assert len(on_branch) == 4
    assert not any(on_branch[turn] for turn in (first, second, third))


def test_rewinding_to_a_sibling(chat: Chat) -> None:
    """Any committed turn of the session may be named; one that failed, or is not there, is not found."""
    _, second = talk(chat, "one", "two")
    chat.client.post("/sessions/s/rewind", json={"turns": 1})
    (sibling,) = talk(chat, "other")
    assert chat.client.post("/sessions/s/rewind", json={"turn_id": second}).json()["head"] == second
    assert seen(chat.say("next").json()["reply"]) == ["one?", "one", "two?", "two", "next"]
    assert chat.client.post("/sessions/s/rewind", json={"turn_id": sibling}).json()["head"] == sibling
    chat.models.script({"mode": "status", "status": 400})
    failed = problem(chat.say("x"), 502, "MODEL_ERROR")["turn_id"]
    for turn_id in (failed, STRANGER):
        body = {"turn_id": turn_id}
        problem(chat.client.post("/sessions/s/rewind", json=body), 404, "TURN_NOT_FOUND")
        problem(chat.client.post("/sessions/s/fork", json=body), 404, "TURN_NOT_FOUND")
        problem(chat.say("x", parent=turn_id), 404, "TURN_NOT_FOUND")


def test_moves_expect_a_head(chat: Chat) -> None:
    """``If-Match`` counts by its head part only, for rewind, restore and regenerate."""
    first, _ = talk(chat, "one", "two")
    checkpoint = chat.client.post("/sessions/s/checkpoints").json()["checkpoint_id"]
    paths = {
        "/sessions/s/rewind": {"turns": 1},
        f"/sessions/s/checkpoints/{checkpoint}/restore": {},
        "/sessions/s/regenerate": {},
    }
    for path, body in paths.items():
        for tag in (f'"{first}.1"', '"0.1"', 'W/"x"'):
            response = chat.client.post(path, json=body, headers={"If-Match": tag})
            assert problem(response, 409, "HEAD_MOVED")["session_id"] == "s"
        response = chat.client.post(path, json=body, headers={"If-Match": '"0.1", "0.2"'})
        problem(response, 422, "VALIDATION_ERROR")
    for path, body in paths.items():
        tag = f'"{head(chat)}.12345"'
        assert chat.client.post(path, json=body, headers={"If-Match": tag}).status_code == 200


@pytest.mark.parametrize("target", ["rewind", "restore", "regenerate", "compact"])
def test_moves_while_a_turn_runs(chat: Chat, target: str) -> None:
    """``reject`` is refused and names the turn; ``rollback`` cancels it and goes on from before it."""
    (turn,) = talk(chat, "one")
    checkpoint = chat.client.post("/sessions/s/checkpoints").json()["checkpoint_id"]
    path, body = {
        "rewind": ("/sessions/s/rewind", {"turn_id": turn}),
        "restore": (f"/sessions/s/checkpoints/{checkpoint}/restore", {}),
        "regenerate": ("/sessions/s/regenerate", {}),
        "compact": ("/sessions/s/compact", {}),
    }[target]
    with chat.stream(STALL) as response:
        stream = Stream(response)
        running = stream.next()["turn_id"]
        stream.next()
        busy = problem(chat.client.post(path, json={**body, "on_busy": "reject"}), 409, "SESSION_BUSY")
        assert busy["turn_id"] == running
        chat.models.script({"mode": "text", "text": "after all"})
        moved = chat.client.post(path, json={**body, "on_busy": "rollback"})
        end = stream.rest()[-1]
    assert moved.status_code == 200
    assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "rollback", False)
    assert chat.client.get(f"/sessions/s/turns/{turn}").json()["status"] == "finished"
    assert chat.client.get("/sessions/s").json()["turn_count"] == 1


def test_a_rewind_waits_for_the_turn(chat: Chat) -> None:
    """By default it goes on when the running turn has ended, and that turn is what it takes back."""
    (turn,) = talk(chat, "one")
    with chat.stream(says("a b c d", delay_s=0.05)) as response:
        stream = Stream(response)
        stream.next()
        moved = chat.client.post("/sessions/s/rewind", json={"turns": 1}).json()
        assert stream.rest()[-1]["type"] == "turn.finished"
    assert moved["head"] == turn


def test_a_move_whose_client_leaves_does_not_happen(chat: Chat) -> None:
    """Rewinds that wait for a turn are dropped with their connections."""
    talk(chat, "one")
    with chat.stream(STALL) as response:
        stream = Stream(response)
        running = stream.next()["turn_id"]
        stream.next()
        for _ in range(DEPTH + 1):  # more than may wait: those that have left wait no more
            with pytest.raises(httpx2.ReadTimeout):
                chat.client.post("/sessions/s/rewind", json={"turns": 1}, timeout=0.1)
        for _ in range(10):  # round trips, in which the server hears of the last departure
            assert chat.active()["turn_id"] == running
        chat.client.post("/sessions/s/cancel")
        assert stream.rest()[-1]["type"] == "turn.cancelled"
    assert chat.say(says("next")).json()["turn_count"] == 3


def test_a_fork_goes_its_own_way(chat: Chat) -> None:
    """201 with the way to it; it keeps the turns' ids; neither hears of the other again."""
    first, second = talk(chat, "one", "two")
    chat.client.patch("/sessions/s", json={"metadata": {"kept": True}, "title": "original"})
    response = chat.client.post("/api/sessions/s/fork", json={"turn_id": first, "session_id": "copy"})
    fork = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == "/api/sessions/copy"
    assert response.headers["etag"] == f'"{first}.1"'
    assert list(fork) == FIELDS
    assert (fork["session_id"], fork["head"], fork["turn_count"]) == ("copy", first, 1)
    assert fork["metadata"] == {"kept": True}
    assert seen(chat.say("mine", session_id="copy").json()["reply"]) == ["one?", "one", "mine"]
    assert head(chat) == second
    chat.client.delete("/sessions/s")
    assert chat.client.get(f"/sessions/copy/turns/{first}").json()["reply"] == "one"


def test_a_fork_from_the_head_and_from_a_checkpoint(chat: Chat) -> None:
    """No body at all: from the head, with an id of its own; ``null`` is as left out."""
    first, second = talk(chat, "one", "two")
    chat.client.post("/sessions/s/rewind", json={"turn_id": first})
    checkpoint = chat.client.post("/sessions/s/checkpoints").json()["checkpoint_id"]
    chat.client.post("/sessions/s/rewind", json={"turn_id": second})
    nothing = {"checkpoint_id": None, "turn_id": None, "session_id": "", "metadata": None}
    for content in ({}, {"json": {}}, {"json": nothing}):
        fork = chat.client.post("/sessions/s/fork", **content).json()
        assert UUID7.fullmatch(fork["session_id"])
        assert fork["head"] == second
    body = {"checkpoint_id": checkpoint, "conversation_id": "copy", "metadata": {"token": "t"}}
    fork = chat.client.post("/sessions/s/fork", json=body).json()
    assert (fork["session_id"], fork["head"]) == ("copy", first)
    assert fork["metadata"] == {"token": "[redacted]"}
    problem(chat.client.post("/sessions/s/fork", json=body), 409, "SESSION_EXISTS")
    problem(chat.client.get("/sessions/copy/checkpoints/latest"), 404, "CHECKPOINT_NOT_FOUND")
    problem(
        chat.client.post("/sessions/s/fork", json={"checkpoint_id": STRANGER}), 404, "CHECKPOINT_NOT_FOUND"
    )


def test_an_edited_message(chat: Chat) -> None:
    """``parent`` makes a new branch from that turn, or from the root; the old one stays."""
    first, second = talk(chat, "one", "two")
    edited = chat.say("edited", parent=first).json()
    assert seen(edited["reply"]) == ["one?", "one", "edited"]
    assert edited["turn_count"] == 2
    assert chat.client.get(f"/sessions/s/turns/{edited['turn_id']}").json()["parent"] == first
    assert chat.client.get(f"/sessions/s/turns/{second}").json()["on_branch"] is False
    with chat.stream("from the start", parent="root") as response:
        finished = Stream(response).rest()[-1]
    assert (seen(finished["reply"]), finished["turn_count"]) == (["from the start"], 1)


def test_regenerating(chat: Chat) -> None:
    """A sibling with the same input and another answer; the body may be missing."""
    first, second = talk(chat, "one", "two")
    chat.client.patch("/sessions/s/state", json={"state": {"kept": 1}})
    asked = chat.client.get(f"/sessions/s/turns/{second}").json()["input"]
    response = chat.client.post("/sessions/s/regenerate")
    answer = response.json()
    turn = chat.client.get(f"/sessions/s/turns/{answer['turn_id']}").json()
    assert (turn["parent"], turn["input"]) == (first, asked)
    assert (answer["head"], answer["turn_count"]) == (answer["turn_id"], 2)
    assert (response.headers["x-session-id"], response.headers["x-turn-id"]) == ("s", answer["turn_id"])
    assert chat.client.get("/sessions/s/state").json() == {"state": {"kept": 1}}
    options = {"model_name": "m-2", "params": {"seed": 7}, "on_busy": None, "on_disconnect": "cancel"}
    again = chat.client.post("/sessions/s/regenerate", json=options).json()
    assert again["model"] == "m-2"
    assert chat.models.requests()[-1]["seed"] == 7
    assert len(chat.client.get("/sessions/s/turns").json()["turns"]) == 4


def test_regenerating_as_a_stream(chat: Chat) -> None:
    """``stream=true`` answers as ``/chat/stream`` does; failures after the start are events."""
    (first,) = talk(chat, "one")
    with chat.client.stream("POST", "/sessions/s/regenerate?stream=true") as response:
        assert response.headers["content-type"] == "text/event-stream"
        events = Stream(response).rest()
    assert [event["type"] for event in events if event["type"] != "text.delta"] == [
        "turn.started",
        "message.completed",
        "turn.finished",
    ]
    assert events[0]["turn_id"] == response.headers["x-turn-id"] != first
    chat.models.script({"mode": "status", "status": 400})
    body: Json = {}
    with chat.client.stream("POST", "/sessions/s/regenerate?stream=true", json=body) as response:
        assert Stream(response).rest()[-1]["code"] == "MODEL_ERROR"
    assert head(chat) == events[-1]["head"]
    problem(chat.client.post("/sessions/s/regenerate?stream=1"), 422, "VALIDATION_ERROR")


def test_regenerating_once(chat: Chat) -> None:
    """A repeat with the same key gets the same turn, whichever way; another request is refused."""
    talk(chat, "one")
    headers = {"Idempotency-Key": "again-1"}
    first = chat.client.post("/sessions/s/regenerate", headers=headers).json()
    assert chat.client.post("/sessions/s/regenerate", headers=headers).json() == first
    with chat.client.stream("POST", "/sessions/s/regenerate?stream=true", headers=headers) as response:
        assert Stream(response).rest()[-1]["head"] == first["head"]
    body = {"params": {"seed": 1}}
    other = chat.client.post("/sessions/s/regenerate", json=body, headers=headers)
    problem(other, 422, "IDEMPOTENCY_MISMATCH")
    bad = chat.client.post("/sessions/s/regenerate", headers={"Idempotency-Key": "a b"})
    problem(bad, 422, "VALIDATION_ERROR")
    assert len(chat.client.get("/sessions/s/turns").json()["turns"]) == 2


def test_nothing_to_answer_or_to_sum_up(client: httpx2.Client) -> None:
    """Without a turn, regenerate and compact have none to work on."""
    client.post("/sessions", json={"session_id": "s"})
    problem(client.post("/sessions/s/regenerate"), 404, "TURN_NOT_FOUND")
    problem(client.post("/sessions/s/compact"), 404, "TURN_NOT_FOUND")
    problem(client.post("/sessions/s/rewind", json={"turns": 1}), 422, "VALIDATION_ERROR")


def test_summing_up(chat: Chat) -> None:
    """The model's summary stands for the turns; session and history are as before."""
    *_, last = talk(chat, "one", "two")
    before = chat.client.get("/sessions/s/history").json(), head(chat)
    chat.models.script({"mode": "text", "text": "all about numbers"})
    answer = chat.client.post("/sessions/s/compact").json()
    assert list(answer) == ["turn_id", "summary", "tokens_before", "tokens_after"]
    assert (answer["turn_id"], answer["summary"]) == (last, "all about numbers")
    assert answer["tokens_before"] > 0 < answer["tokens_after"]
    assert (chat.client.get("/sessions/s/history").json(), head(chat)) == before
    told = seen(chat.say("next").json()["reply"])
    assert told[1:] == ["all about numbers", "next"]


def test_a_summary_that_fails_changes_nothing(chat: Chat) -> None:
    """The model's failure is answered as a chat's is."""
    talk(chat, "one")
    tag = chat.client.get("/sessions/s").headers["etag"]
    chat.models.script({"mode": "status", "status": 400})
    problem(chat.client.post("/sessions/s/compact"), 502, "MODEL_ERROR")
    assert chat.client.get("/sessions/s").headers["etag"] == tag
    assert seen(chat.say("next").json()["reply"]) == ["one?", "one", "next"]


def test_an_archived_session_stays_where_it_is(chat: Chat) -> None:
    """It is not moved, answered anew or edited; reading, checkpoints and forks are fine."""
    talk(chat, "one")
    checkpoint = chat.client.post("/sessions/s/checkpoints").json()["checkpoint_id"]
    chat.client.patch("/sessions/s", json={"status": "archived"})
    for path, body in (
        ("/sessions/s/rewind", {"turns": 1}),
        (f"/sessions/s/checkpoints/{checkpoint}/restore", {}),
        ("/sessions/s/regenerate", {}),
    ):
        problem(chat.client.post(path, json=body), 409, "SESSION_ARCHIVED")
    problem(chat.say("x", parent="root"), 409, "SESSION_ARCHIVED")
    assert chat.client.post("/sessions/s/checkpoints").status_code == 201
    assert chat.client.post("/sessions/s/fork", json={"session_id": "copy"}).json()["status"] == "active"


def test_another_sessions_places(chat: Chat) -> None:
    """A checkpoint or a turn of another session is as good as none."""
    talk(chat, "one")
    chat.client.post("/sessions", json={"session_id": "copy"})
    theirs = chat.say("theirs", session_id="copy").json()["turn_id"]
    checkpoint = chat.client.post("/sessions/copy/checkpoints").json()["checkpoint_id"]
    path = f"/sessions/s/checkpoints/{checkpoint}"
    for method, target in (("GET", path), ("DELETE", path), ("POST", path + "/restore")):
        problem(chat.client.request(method, target), 404, "CHECKPOINT_NOT_FOUND")
    fork = chat.client.post("/sessions/s/fork", json={"checkpoint_id": checkpoint})
    problem(fork, 404, "CHECKPOINT_NOT_FOUND")
    problem(chat.client.post("/sessions/s/rewind", json={"turn_id": theirs}), 404, "TURN_NOT_FOUND")
    problem(chat.say("x", parent=theirs), 404, "TURN_NOT_FOUND")
