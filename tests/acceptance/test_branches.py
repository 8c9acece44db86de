"""What the model is sent after each operation on branches, in a warm pool, after an eviction, after a kill.

The scripted model says what it was sent; the truth is what the test itself remembers of each
turn: a tree of messages by turn id.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.modelserver import ModelServer
from tests.serverprocess import ServerProcess

Messages = list[tuple[str, str]]

SUMMARY_TEXT = "They counted from one to three."


class Talk:
    """One session of a real server, and what each of its turns has said."""

    def __init__(self, server: ServerProcess, model: ModelServer, between: str) -> None:
        self.server = server
        self.model = model
        self.between = between
        self.paths: dict[str | None, Messages] = {None: []}  # turn id: what a path to it holds
        self.parents: dict[str | None, str | None] = {}
        self.head: str | None = None
        self.said = self.pauses = 0

    def post(self, path: str, body: Any = None, *, session: str = "a", status: int = 200) -> Any:
        reply = self.server.request("POST", f"/sessions/{session}{path}", body if body is not None else {})
        assert reply.status == status, reply.body
        return reply.body

    def pause(self) -> None:
        """Do what may happen between turns: nothing, an eviction, now and then a kill and a new process."""
        self.pauses += 1
        if self.between == "evicted":
            self.server.request("DELETE", "/agent-sessions/a")
        elif self.between == "killed" and self.pauses % 3 == 2:
            self.server.kill()
            self.server.start()

    def chat(self, parent: str | None = None, session: str = "a") -> Any:
        """Take a turn from the head or ``parent``, and check what the model was sent for it."""
        self.pause()
        self.said += 1
        body = {"session_id": session, "message": f"message {self.said}"}
        reply = self.server.request("POST", "/chat", body if parent is None else {**body, "parent": parent})
        assert reply.status == 200, reply.body
        begin = self.head if parent is None else None if parent == "root" else parent
        self._learn(reply.body, begin, body["message"])
        return reply.body

    def again(self) -> Any:
        """Ask for another answer to the head's input."""
        self.pause()
        answer = self.post("/regenerate")
        said = self.paths[self.head][-2][1]
        self._learn(answer, self.parents[self.head], said)
        return answer

    def _learn(self, answer: Any, begin: str | None, said: str) -> None:
        sent = sent_to(self.model)
        assert sent == [*self.paths[begin], ("user", said)]
        self.paths[answer["turn_id"]] = [*sent, ("assistant", answer["reply"])]
        self.parents[answer["turn_id"]] = begin
        self.head = answer["head"]
        assert self.head == answer["turn_id"]
        assert answer["message_count"] == len(self.paths[self.head])


def sent_to(model: ModelServer) -> Messages:
    """Return the messages of the newest request, without the system prompt."""
    messages = model.requests()[-1]["messages"]
    return [(m["role"], m["content"]) for m in messages if m["role"] != "system"]


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def serve(tmp_path: Path, model: ModelServer) -> Iterator[Callable[..., ServerProcess]]:
    servers: list[ServerProcess] = []

    def start(**settings: str) -> ServerProcess:
        openai = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": model.base_url, "OPENAI_MODEL": "m"}
        server = ServerProcess(tmp_path, **openai, **settings)
        servers.append(server)
        server.start()
        return server

    model.reset()
    yield start
    for server in servers:
        server.kill()


@pytest.mark.parametrize("between", ["warm", "evicted", "killed"])
def test_the_model_is_sent_the_path_to_the_head(serve, model, between):
    """After rewind, restore, edit, regenerate and fork: exactly the messages from the root to the head."""
    talk = Talk(serve(), model, between)
    one, two = talk.chat()["turn_id"], talk.chat()["turn_id"]
    named = talk.post("/checkpoints", {"label": "two"}, status=201)
    assert named["turn_id"] == two
    three = talk.chat()["turn_id"]

    talk.head = talk.post("/rewind", {"turn_id": one})["head"]  # back, and a branch from there
    assert talk.head == one
    four = talk.chat()["turn_id"]
    talk.head = talk.post("/rewind", {"turn_id": three})["head"]  # to a sibling
    talk.chat()
    talk.head = talk.post("/rewind", {"turns": 2})["head"]
    assert talk.head == two
    talk.chat(parent=one)  # an edit beside both
    talk.chat(parent="root")
    talk.again()
    talk.head = talk.post(f"/checkpoints/{named['checkpoint_id']}/restore")["head"]
    assert talk.head == two
    talk.again()
    talk.chat()

    fork = talk.post("/fork", {"turn_id": four, "session_id": "b"}, status=201)
    assert (fork["head"], fork["turn_count"]) == (four, 2)
    origin, talk.head = talk.head, four
    talk.chat(session="b")
    assert talk.server.request("DELETE", "/sessions/b").status == 200
    talk.head = origin
    talk.chat()
    _check_turns(talk)


def _check_turns(talk: Talk) -> None:
    turns = talk.server.request("GET", "/sessions/a/turns?limit=200").body["turns"]
    on_branch = {turn["turn_id"] for turn in turns if turn["on_branch"]}
    path, turn_id = set(), talk.head
    while turn_id is not None:
        path.add(turn_id)
        turn_id = talk.parents[turn_id]
    assert on_branch == path
    history = talk.server.request("GET", "/sessions/a/history?limit=200").body["messages"]
    assert [(m["role"], m["content"]) for m in history] == talk.paths[talk.head]


@pytest.mark.parametrize("between", ["warm", "evicted", "killed"])
def test_a_fork_lives_without_its_origin(serve, model, between):
    """The origin is deleted; the fork goes on from the same path."""
    talk = Talk(serve(), model, between)
    talk.chat()
    talk.chat()
    talk.post("/fork", {"session_id": "b"}, status=201)
    assert talk.server.request("DELETE", "/sessions/a").status == 200
    talk.chat(session="b")
    turns = talk.server.request("GET", "/sessions/b/turns").body["turns"]
    assert len(turns) == 3


@pytest.mark.parametrize("between", ["warm", "evicted", "killed"])
def test_the_model_is_sent_the_summary_and_what_came_after(serve, model, between):
    """After a compaction; before its turn everything is sent again, and back behind it the summary."""
    talk = Talk(serve(), model, between)
    for _ in range(3):
        talk.chat()
    compacted = talk.head
    model.script({"mode": "text", "text": SUMMARY_TEXT})
    note = talk.post("/compact")
    assert (note["turn_id"], note["summary"]) == (compacted, SUMMARY_TEXT)
    assert note["tokens_before"] > note["tokens_after"] > 0
    whole = list(talk.paths[compacted])
    talk.pause()
    for number in range(2):
        reply = talk.server.request("POST", "/chat", {"session_id": "a", "message": f"after {number}"}).body
        assert reply["turn_count"] == 4 + number
        sent = sent_to(model)
        assert SUMMARY_TEXT in [text for _, text in sent]
        assert not any(text in [t for _, t in sent] for _, text in whole)
        assert sent[-1] == ("user", f"after {number}")
        assert len(sent) == 2 + 1 + 2 * number
    history = talk.server.request("GET", "/sessions/a/history?limit=200").body["messages"]
    assert [(m["role"], m["content"]) for m in history][:6] == whole
    path = [turn_id for turn_id, path in talk.paths.items() if len(path) == 4]
    talk.head = talk.post("/rewind", {"turn_id": path[0]})["head"]
    talk.chat()
    talk.post("/rewind", {"turn_id": reply["head"]})
    talk.pause()
    talk.server.request("POST", "/chat", {"session_id": "a", "message": "again"})
    assert SUMMARY_TEXT in [text for _, text in sent_to(model)]


def test_a_long_session_is_summed_up_by_itself(serve, model):
    """Above COMPACT_AFTER_TOKENS the model is asked for a summary, and later turns are sent that."""
    server = serve(COMPACT_AFTER_TOKENS="60")
    model.script({"mode": "text", "text": "word " * 60}, {"mode": "text", "text": SUMMARY_TEXT})
    server.request("POST", "/chat", {"session_id": "a", "message": "tell me all"})
    server.request("POST", "/sessions/a/compact")  # waits for it, or finds it made
    server.request("POST", "/chat", {"session_id": "a", "message": "and now"})
    sent = sent_to(model)
    assert [text for _, text in sent if SUMMARY_TEXT in text]
    assert not [text for _, text in sent if "word word" in text]
    types = {e["type"] for e in server.request("GET", "/sessions/a/events?limit=200").body["events"]}
    assert "session.compacted" in types


def test_a_summary_that_fails_changes_nothing(serve, model):
    """The model's error is told, and the next turn is sent the whole path."""
    talk = Talk(serve(), model, "warm")
    talk.chat()
    model.script({"mode": "status", "status": 400})
    assert talk.post("/compact", status=502)["code"] == "MODEL_ERROR"
    model.script({"mode": "empty_text"})
    assert talk.post("/compact", status=502)["code"] == "MODEL_ERROR"
    talk.chat()


def test_checkpoints_are_made_by_themselves(serve, model):
    """After every second turn of a branch one, of which the newest three stay; also after a kill."""
    talk = Talk(serve(AUTO_CHECKPOINT_EVERY="2", CHECKPOINT_KEEP="3"), model, "warm")
    turns = [talk.chat()["turn_id"] for _ in range(9)]
    talk.server.kill()
    talk.server.start()
    found = talk.server.request("GET", "/sessions/a/checkpoints").body["checkpoints"]
    assert [(c["turn_id"], c["automatic"]) for c in found] == [(turns[n], True) for n in (7, 5, 3)]
    talk.head = talk.post(f"/checkpoints/{found[-1]['checkpoint_id']}/restore")["head"]
    talk.chat()
