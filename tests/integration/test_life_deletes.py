"""Many sessions deleted at once: a user's, an agent's, or named ones; each as one is."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.services.records import DELETE_PAGE
from tests.integration.test_http_chat import STALL, Chat, Stream, says
from tests.integration.test_http_server import HttpServer, problem
from tests.integration.test_policies import settings_for
from tests.modelserver import ModelServer


@pytest.fixture
def chat() -> Iterator[Chat]:
    with ModelServer() as models, HttpServer(**settings_for(models)) as server:
        moves = Chat(server, models)
        yield moves
        moves.close()


def make(chat: Chat, *session_ids: str, **values: str) -> None:
    for session_id in session_ids:
        chat.client.post("/sessions", json={"session_id": session_id, **values})


def test_a_users_sessions_go_and_nobody_elses(chat: Chat) -> None:
    """Two pages and one more; afterwards there is nothing of the user, and a repeat finds nothing."""
    names = [f"s{number}" for number in range(2 * DELETE_PAGE + 1)]
    make(chat, *names, user_id="alice")
    make(chat, "bobs", user_id="bob")
    make(chat, "nobodys")
    assert chat.client.delete("/users/alice/sessions").json() == {"deleted": len(names)}
    assert chat.client.delete("/api/users/alice/sessions").json() == {"deleted": 0}
    left = chat.client.get("/sessions").json()["sessions"]
    assert {one["session_id"] for one in left} == {"bobs", "nobodys"}
    problem(chat.client.delete("/users/a%00b/sessions"), 404, "NOT_FOUND")


def test_an_agents_sessions_go(chat: Chat) -> None:
    """All of them; an agent that nobody knows has none."""
    make(chat, "a", "b")
    assert chat.client.delete("/agents/nobody/sessions").json() == {"deleted": 0}
    assert chat.client.delete("/agents/assistant/sessions").json() == {"deleted": 2}
    assert chat.client.get("/health").json()["session_count"] == 0


def test_named_sessions_go(chat: Chat) -> None:
    """Those that were there and those that were not are counted, each once."""
    make(chat, "a", "b", "c")
    chat.say(says("hi"), "a")
    assert chat.client.get("/sessions/a").json()["live"] is True
    body = {"session_ids": ["a", "b", "a", "x", "y"]}
    assert chat.client.post("/sessions/batch-delete", json=body).json() == {"deleted": 2, "missing": 2}
    assert chat.client.post("/sessions/batch-delete", json=body).json() == {"deleted": 0, "missing": 4}
    assert chat.client.get("/agent-stats").json()["total_agents"] == 0
    assert [one["session_id"] for one in chat.client.get("/sessions").json()["sessions"]] == ["c"]


def test_what_a_batch_delete_may_name(chat: Chat) -> None:
    """Nothing up to a thousand ids, all of them well formed."""
    post = chat.client.post
    assert post("/sessions/batch-delete", json={"session_ids": []}).json() == {"deleted": 0, "missing": 0}
    many = [f"s{number}" for number in range(1001)]
    assert post("/sessions/batch-delete", json={"session_ids": many[1:]}).json()["missing"] == 1000
    problem(post("/sessions/batch-delete", json={"session_ids": many}), 422, "VALIDATION_ERROR")
    problem(post("/sessions/batch-delete", json={"session_ids": ["a b"]}), 422, "VALIDATION_ERROR")
    problem(post("/sessions/batch-delete", json={}), 422, "VALIDATION_ERROR")


@pytest.mark.parametrize("how", ["user", "agent", "named"])
def test_running_and_waiting_turns_end(chat: Chat, how: str) -> None:
    """The running turn ends as ``deleted``, who waited gets 404, and the session does not come back."""
    make(chat, "s", "t", user_id="alice")
    with chat.stream(STALL) as response:
        stream = Stream(response)
        stream.next()
        waiting = chat.saying(says("waiting"))
        chat.until_waiting(1)
        if how == "named":
            answer = chat.client.post("/sessions/batch-delete", json={"session_ids": ["t", "s"]})
        else:
            path = "/users/alice/sessions" if how == "user" else "/agents/assistant/sessions"
            answer = chat.client.delete(path)
        end = stream.rest()[-1]
    assert answer.json()["deleted"] == 2
    assert (end["type"], end["reason"], end["partial_kept"]) == ("turn.cancelled", "deleted", False)
    problem(waiting.result(10), 404, "SESSION_NOT_FOUND")
    problem(chat.client.get("/sessions/s"), 404, "SESSION_NOT_FOUND")
    problem(chat.client.get("/sessions/t"), 404, "SESSION_NOT_FOUND")


def test_deletes_that_meet_count_each_session_once(chat: Chat) -> None:
    """Eight calls for the same sessions, in different orders, end, and together delete each once."""
    names = [f"s{number}" for number in range(40)]
    make(chat, *names, user_id="alice")

    def delete(number: int) -> int:
        if number % 2:
            return int(chat.client.delete("/users/alice/sessions").json()["deleted"])
        ids = names[::-1] if number % 4 else names
        found = chat.client.post("/sessions/batch-delete", json={"session_ids": ids}).json()
        assert found["deleted"] + found["missing"] == len(names)
        return int(found["deleted"])

    with ThreadPoolExecutor(8) as people:
        assert sum(people.map(delete, range(8))) == len(names)
