"""Exporting a user over HTTP: everything, line by line, and what is broken does not stop it."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from pathlib import Path

import pytest
from starlette.types import Send

from app.domain.errors import RateLimited
from app.domain.session import LifeSpan, Session
from app.domain.turn import TurnPage
from app.main import create_app
from app.runtime import Runtime
from app.services.export import EXPORTS, PAGE
from app.stores.memory.store import MemoryStore
from tests.contract.builders import extend, make_session
from tests.integration.test_erasure import SETTINGS, fill
from tests.integration.test_http_chat import Chat
from tests.integration.test_http_server import HttpServer, Json
from tests.integration.test_policies import settings_for
from tests.modelserver import ModelServer
from tests.unit.api.wire import http_scope


@contextmanager
def serve(folder: Path) -> Iterator[Chat]:
    with ModelServer() as models:
        store = {"store_url": f"sqlite:///{folder}/agentpool.db"}
        with HttpServer(**{**settings_for(models), **store}) as server:
            moves = Chat(server, models)
            yield moves
            moves.close()


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    with serve(tmp_path) as moves:
        yield moves


def export(chat: Chat, user_id: str) -> list[Json]:
    """Return the lines, having checked that the last one counts the others."""
    response = chat.client.get(f"/users/{user_id}/export")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.headers["content-disposition"] == 'attachment; filename="user-export.ndjson"'
    assert response.text.endswith("\n")
    header, *lines, end = [json.loads(line) for line in response.text.splitlines()]
    assert (header["kind"], header["format"], header["version"]) == ("header", "agentpool.user-export", 1)
    assert header["user_id"] == user_id
    kinds = [line["kind"] for line in lines]
    assert end == {"kind": "end", "counts": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}
    return lines


def of_kind(lines: list[Json], kind: str) -> list[Json]:
    return [
        {name: value for name, value in line.items() if name != "kind"}
        for line in lines
        if line["kind"] == kind
    ]


def test_everything_of_a_user_is_exported(chat: Chat) -> None:
    """Each kind with all it says: messages of turns, data of checkpoints, notes, state, events, usage."""
    fill(chat, "alice", "a", "b")
    fill(chat, "bob", "c")
    chat.say("again", "a").raise_for_status()
    data = {"label": "with data", "data": {"page": 7}}
    chat.client.post("/sessions/a/checkpoints", json=data).raise_for_status()
    chat.models.script({"mode": "text", "text": "all about greetings"})
    chat.client.post("/sessions/a/compact").raise_for_status()
    lines = export(chat, "alice")
    sessions = of_kind(lines, "session")
    assert [(one["session_id"], one["user_id"]) for one in sessions] == [("a", "alice"), ("b", "alice")]
    assert sessions[0]["state"] == {"n": 1}
    turns = of_kind(lines, "turn")
    assert [(one["session_id"], one["input"]) for one in turns] == [("a", "again"), ("a", "hi"), ("b", "hi")]
    assert turns[0]["messages"] == [
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": turns[0]["reply"], "reasoning": ""},
    ]
    checkpoints = of_kind(lines, "checkpoint")
    assert [(one["label"], one["data"]) for one in checkpoints] == [
        ("with data", {"page": 7}),
        ("here", {}),
        ("here", {}),
    ]
    (note,) = of_kind(lines, "note")
    assert note["turn_id"] == turns[0]["turn_id"]
    assert note["summary"] == "all about greetings"
    assert [one["type"] for one in of_kind(lines, "event")] == [
        "state.changed",
        "session.compacted",
        "state.changed",
    ]
    assert of_kind(lines, "user_state") == [
        {"app_name": app, "state": {"name": "alice"}} for app in ("default", "other")
    ]
    (usage,) = of_kind(lines, "usage")
    assert usage["turns"] == 3
    assert [day["turns"] for day in usage["days"]] == [3]
    assert "bob" not in json.dumps(lines)


def test_of_nobody_there_is_nothing(chat: Chat) -> None:
    """A user that was never there, or is erased, has an empty export: the usage says zero."""
    empty = [{"kind": "usage", "turns": 0, "prompt_tokens": 0, "completion_tokens": 0, "days": []}]
    assert export(chat, "nobody") == empty
    fill(chat, "alice", "a")
    assert export(chat, "alice") != empty
    chat.client.delete("/users/alice").raise_for_status()
    assert export(chat, "alice") == empty


def test_what_is_broken_is_named_and_passed(tmp_path: Path) -> None:
    """A session whose record is broken, a broken checkpoint, a broken turn: all else is exported."""
    with serve(tmp_path) as chat:
        fill(chat, "alice", "a", "b", "c", "d")
    with closing(sqlite3.connect(tmp_path / "agentpool.db")) as database, database:
        number = "(SELECT id FROM sessions WHERE session_id = '{}')"
        database.execute("UPDATE sessions SET title = 'other' WHERE session_id = 'a'")
        database.execute(f"UPDATE checkpoints SET body = x'00' WHERE session = {number.format('b')}")
        database.execute(f"UPDATE turns SET body = x'00' WHERE session = {number.format('c')}")
        database.execute("UPDATE shared_state SET body = x'00' WHERE app_name = 'other'")
    with serve(tmp_path) as chat:
        lines = export(chat, "alice")
    assert of_kind(lines, "unreadable") == [{"session_id": "a"}, {"session_id": "b"}, {"app_name": "other"}]
    assert [one["session_id"] for one in of_kind(lines, "session")] == ["b", "c", "d"]
    assert [one["session_id"] for one in of_kind(lines, "checkpoint")] == ["c", "d"]
    errors = {one["session_id"]: one["error"] and one["error"]["code"] for one in of_kind(lines, "turn")}
    assert errors == {"b": None, "c": "SNAPSHOT_UNREADABLE", "d": None}
    assert [one["session_id"] for one in of_kind(lines, "event")] == ["b", "c", "d"]


class CountedStore(MemoryStore):
    """Counts the pages of turns that are read."""

    pages = 0

    async def list_turns(self, session: Session, limit: int, cursor: str | None = None) -> TurnPage:
        self.pages += 1
        assert limit == PAGE
        return await super().list_turns(session, limit, cursor)


def collect(messages: list[Json]) -> Send:
    async def send(message: Json) -> None:
        messages.append(message)

    return send


async def fill_long(store: MemoryStore, sessions: int) -> None:
    """Store sessions of some 2 MB each."""
    for number in range(sessions):
        session = make_session(f"s{number}", user_id="u")
        await store.create_session(session)
        session, _ = await extend(store, session, 2 * PAGE + 1, reply="x" * 10_000)


async def test_turns_are_read_a_page_at_a_time() -> None:
    """Nothing of a page is read before the one before it was taken."""
    store = CountedStore(LifeSpan())
    async with Runtime(SETTINGS, store=store) as runtime:
        await fill_long(store, 1)
        async with runtime.sessions.export_user("", "u") as pieces:
            assert store.pages == 0
            seen = [type(await anext(pieces)).__name__ for _ in range(PAGE + 1)]
            assert seen == ["SessionView"] + PAGE * ["OfSession"]
            assert store.pages == 1
            await anext(pieces)
            assert store.pages == 2


async def test_so_many_exports_at_a_time() -> None:
    """One of a user, and few in all; who is refused is told when to come back, and then gets in."""
    async with Runtime(SETTINGS, store=MemoryStore(LifeSpan())) as runtime, AsyncExitStack() as exports:
        export = runtime.sessions.export_user
        first = await exports.enter_async_context(AsyncExitStack())
        await first.enter_async_context(export("", "u0"))
        with pytest.raises(RateLimited) as refusal:
            await exports.enter_async_context(export("", "u0"))
        assert refusal.value.retry_after_s
        for number in range(1, EXPORTS):
            await exports.enter_async_context(export("", f"u{number}"))
        with pytest.raises(RateLimited):
            await exports.enter_async_context(export("", "another"))
        await first.aclose()
        await exports.enter_async_context(export("", "another"))


async def test_a_client_that_does_not_read_and_one_that_leaves_end_the_reading() -> None:
    """What is not taken is not read, and no second one begins; when the client goes, the answer ends."""
    store, taken, leaves = CountedStore(LifeSpan()), asyncio.Semaphore(2), asyncio.Event()

    async def receive() -> Json:
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send(message: Json) -> None:
        await taken.acquire()

    async with Runtime(SETTINGS, store=store) as runtime:
        await fill_long(store, 5)
        app = create_app(runtime=runtime)
        answering = asyncio.ensure_future(app(http_scope("GET", "/users/u/export"), receive, send))
        async with asyncio.timeout(10):
            while not taken.locked():  # noqa: ASYNC110
                await asyncio.sleep(0)
        # 10 KB a turn: the chunk that nobody takes is of the first page.
        assert store.pages == 1
        refused: list[Json] = []
        await app(http_scope("GET", "/users/u/export"), receive, collect(refused))
        assert refused[0]["status"] == 429
        assert b"retry-after" in dict(refused[0]["headers"])
        leaves.set()
        await asyncio.wait_for(answering, 10)
        assert store.pages == 1
        async with runtime.sessions.export_user("", "u"):
            pass


async def test_who_has_the_last_line_may_have_another_one() -> None:
    """When the end of an export can be read, the export is over."""
    after: list[Json] = []

    async def receive() -> Json:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Json) -> None:
        if b'"kind":"end"' in message.get("body", b""):
            await app(http_scope("GET", "/users/u/export"), receive, collect(after))

    async with Runtime(SETTINGS, store=MemoryStore(LifeSpan())) as runtime:
        app = create_app(runtime=runtime)
        await app(http_scope("GET", "/users/u/export"), receive, send)
    assert after[0]["status"] == 200
