"""A session's story over HTTP: which events, in which order, from where on, and of which kinds."""

from collections.abc import Iterator

import pytest

from tests.integration.test_http_chat import STALL, Chat, Stream, says
from tests.integration.test_http_server import HttpServer, Json, problem
from tests.integration.test_http_sessions import TIME
from tests.modelserver import ModelServer

PLAIN_TURN = ["turn.started", "text.delta", "message.completed", "turn.finished"]
STRANGER = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"


@pytest.fixture(scope="module")
def models() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture(scope="module")
def server(models: ModelServer) -> Iterator[HttpServer]:
    settings = {"model_provider": "openai", "openai_api_key": "k", "openai_base_url": models.base_url}
    with HttpServer(**settings) as running:
        yield running


@pytest.fixture
def chat(server: HttpServer, models: ModelServer) -> Iterator[Chat]:
    """A chat whose session ``s`` is new."""
    models.reset()
    server.client.delete("/sessions/s")
    moves = Chat(server, models)
    yield moves
    moves.close()


def events(chat: Chat, **query: object) -> list[Json]:
    response = chat.client.get("/sessions/s/events", params=query)
    assert response.status_code == 200, response.text
    document = response.json()
    assert list(document) == ["events"]
    found: list[Json] = document["events"]
    return found


def kinds(found: list[Json]) -> list[str]:
    return [event["type"] for event in found]


def test_events_say_what_the_stream_said(chat: Chat) -> None:
    """The same members under the same numbers; the text as one delta, as a stream from the store."""
    with chat.stream(says("one two")) as response:
        stream = Stream(response).rest()
    told = events(chat)
    assert kinds(told) == PLAIN_TURN
    for event in told:
        assert list(event)[:5] == ["id", "type", "turn_id", "seq", "created_at"]
        assert event["id"] == f"{event['turn_id']}:{event['seq']}"
        assert TIME.fullmatch(event["created_at"])
    assert told[1]["text"] == "one two"
    live = {event["seq"]: event for event in stream if event["type"] != "text.delta"}
    for event in (told[0], *told[2:]):
        assert event | live[event["seq"]] == event


def test_failed_and_cancelled_turns_are_told(chat: Chat) -> None:
    """A failure says what its problem was, and nothing of the request; a cancel says what was kept."""
    chat.models.script({"mode": "status", "status": 400})
    failure = problem(chat.say(), 502, "MODEL_ERROR")
    with chat.stream(STALL) as response:
        stream = Stream(response)
        stream.next()
        stream.next()
        chat.client.post("/sessions/s/cancel", json={"keep_partial": False})
        stream.rest()
    failed, cancelled = events(chat, types="turn.failed,turn.cancelled")
    assert failed["problem_type"] == failure["type"]
    for name in ("title", "status", "detail", "code", "turn_id"):
        assert failed[name] == failure[name]
    assert not {"instance", "request_id"} & set(failed)
    assert (cancelled["reason"], cancelled["partial_kept"], cancelled["head"]) == ("user", False, None)


def test_what_happens_between_turns_is_told(chat: Chat) -> None:
    """Changes of state and head, and summaries: facts without a turn and a number, in their place."""
    first = chat.say("one").json()["turn_id"]
    chat.client.patch("/sessions/s/state", json={"state": {"a": 1, "token": "t", "b": None}})
    checkpoint = chat.client.post("/sessions/s/checkpoints").json()["checkpoint_id"]
    second = chat.say("two").json()["turn_id"]
    chat.client.post("/sessions/s/compact")
    chat.client.post("/sessions/s/rewind", json={"turns": 2})
    chat.client.post(f"/sessions/s/checkpoints/{checkpoint}/restore")
    told = events(chat)
    assert kinds(told) == [
        *PLAIN_TURN,
        "state.changed",
        *PLAIN_TURN,
        "session.compacted",
        "head.moved",
        "head.moved",
    ]
    facts = [event for event in told if event["turn_id"] is None]
    assert all(event["seq"] is None for event in facts)
    named = [
        {k: v for k, v in event.items() if k not in ("id", "created_at", "turn_id", "seq")} for event in facts
    ]
    assert named[0] == {"type": "state.changed", "state": {"a": 1, "token": "[redacted]", "b": None}}
    assert named[1].pop("note_id")
    assert named[1] == {"type": "session.compacted", "through": second}
    assert named[2] == {"type": "head.moved", "cause": "rewind", "previous": second, "head": None}
    assert named[3] == {
        "type": "head.moved",
        "cause": "restore",
        "previous": None,
        "head": first,
        "checkpoint_id": checkpoint,
    }
    assert len({event["id"] for event in told}) == len(told)
    times = [event["created_at"] for event in told]
    assert times == sorted(times)


@pytest.fixture
def told(chat: Chat) -> list[Json]:
    """A story of turns of all kinds and of facts, whole."""
    for n in range(3):
        chat.say(f"m{n}")
        chat.client.patch("/sessions/s/state", json={"state": {"n": n}})
    chat.models.script({"mode": "status", "status": 400})
    chat.say("fails")
    chat.client.post("/sessions/s/rewind", json={"turns": 1})
    chat.say("again")
    whole = events(chat, limit=200)
    assert len(whole) == 4 * len(PLAIN_TURN) + 3 + 2 + 1
    return whole


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_paging_both_ways(chat: Chat, told: list[Json], limit: int) -> None:
    """From any event on, page by page, forwards and backwards: each event once, in order."""
    assert events(chat, limit=limit) == told[-limit:]
    backwards = events(chat, limit=limit)
    while page := events(chat, limit=limit, before=backwards[0]["id"]):
        backwards = page + backwards
    assert backwards == told
    forwards = told[:1]
    while page := events(chat, limit=limit, after=forwards[-1]["id"]):
        forwards += page
    assert forwards == told


def test_every_event_is_a_position(chat: Chat, told: list[Json]) -> None:
    """What follows it and what comes before it, and never itself."""
    for index, event in enumerate(told):
        assert events(chat, limit=200, after=event["id"]) == told[index + 1 :]
        assert events(chat, limit=200, before=event["id"]) == told[:index]


def test_events_since_a_time(chat: Chat, told: list[Json]) -> None:
    """Those of that time or later, whatever the offset it is written with; the newest page of them."""
    middle = told[len(told) // 2]["created_at"]
    later = [event for event in told if event["created_at"] >= middle]
    assert events(chat, limit=200, since=middle) == later
    assert events(chat, limit=200, since=middle[:-1] + "+00:00") == later
    assert events(chat, limit=2, since=middle) == later[-2:]
    assert events(chat, limit=200, since=middle, after=later[0]["id"]) == later[1:]
    assert events(chat, limit=200, since=middle, before=later[0]["id"]) == []
    assert events(chat, since="0001-01-01T00:00:00+23:59", limit=200) == told
    assert events(chat, since="9999-12-31T23:59:59.999999z") == []


def test_events_by_type(chat: Chat, told: list[Json]) -> None:
    """Only those; ``limit`` counts what is told."""
    wanted = [event for event in told if event["type"] in ("turn.finished", "state.changed")]
    assert events(chat, types="state.changed,turn.finished", limit=200) == wanted
    assert events(chat, types="turn.finished,state.changed", limit=3) == wanted[-3:]
    assert events(chat, types="turn.finished,state.changed", limit=3, after=told[0]["id"]) == wanted[:3]
    assert events(chat, types="tool.called,reasoning.delta") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=1&limit=2", "limit"),
        ("limit=1_000", "limit"),
        ("types=", "types"),
        ("types=nope", "types"),
        ("types=turn.started,", "types"),
        ("types=turn.started&types=turn.failed", "types"),
        ("types=Turn.started", "types"),
        ("since=", "since"),
        ("since=yesterday", "since"),
        ("since=2026-11-20", "since"),
        ("since=2026-11-20T10:00:00", "since"),
        ("since=2026-02-30T10:00:00Z", "since"),
        ("since=2026-11-20T25:00:00Z", "since"),
        ("since=2026-11-20T10:00:00+08:00", "since"),
        ("since=1800000000", "since"),
        ("after=", "after"),
        ("after=nonsense", "after"),
        ("after=fact:x", "after"),
        (f"after={STRANGER}", "after"),
        ("before=1:2:3", "before"),
        ("before=" + "9" * 200, "before"),
        (f"after={STRANGER}:1&before={STRANGER}:2", "before"),
        ("cursor=x", "cursor"),
    ],
)
def test_questions_that_do_not_fit(chat: Chat, query: str, field: str) -> None:
    """Refused at the one field that does not fit; a bare ``+`` in a query is a space."""
    chat.client.post("/sessions", json={"session_id": "s"})
    document = problem(chat.client.get(f"/sessions/s/events?{query}"), 422, "VALIDATION_ERROR")
    assert [error["field"] for error in document["errors"]] == [field]


def test_events_of_nothing(chat: Chat) -> None:
    """A new session has none; a missing one, another user's, and another session's event are not found."""
    chat.client.post("/sessions", json={"session_id": "s", "user_id": "alice"})
    assert events(chat) == []
    problem(chat.client.get("/sessions/none/events"), 404, "SESSION_NOT_FOUND")
    problem(chat.client.get("/sessions/s/events?user_id=bob"), 404, "SESSION_NOT_FOUND")
    for name in ("after", "before"):
        problem(chat.client.get(f"/sessions/s/events?{name}={STRANGER}:1"), 404, "TURN_NOT_FOUND")


def test_a_running_turn_has_begun(chat: Chat) -> None:
    """What it has said is not stored yet, that it started is."""
    with chat.stream(STALL) as response:
        stream = Stream(response)
        turn_id = stream.next()["turn_id"]
        stream.next()
        assert [(event["id"], event["type"]) for event in events(chat)] == [(f"{turn_id}:1", "turn.started")]
        chat.client.post("/sessions/s/cancel")
        stream.rest()
