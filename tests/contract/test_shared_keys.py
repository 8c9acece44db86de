"""What PostgreSQL and Redis keep with keys: nothing that tells, and nothing that counts for another."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from app.domain.branch import ToTurn
from app.domain.compaction import Note
from app.domain.errors import SnapshotUnreadable
from app.domain.idempotency import Binding, fingerprint
from app.domain.session import Session, SessionChange, SessionQuery
from app.domain.state import StateScope
from app.domain.turn import TurnError, TurnStatus, Usage
from app.ports import MovableStore
from app.stores.keyring import KeyRing
from app.stores.postgres import PostgresStore, search
from app.stores.redis import keys as names
from app.stores.redis import listing
from app.stores.redis.store import RedisStore

from .builders import (
    BOOT,
    LIFE,
    T0,
    current,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    running,
    stored_session,
)
from .conftest import fresh_prefix
from .moving import LATER, all_reads, fill

OLD, NEW = b"o" * 32, b"n" * 32
SAID = (
    "Title", "\\ud83e\\udd26", "temperature", "context", "other root", "regenerated", "because", "Later.",
    "edited", "The model does not answer",
)  # fmt: skip
"""What is put into content: titles, params, templates, turns, notes, checkpoints, states, events, errors."""
ROOMS = {"turns": "t", "states": "k", "notes": "n", "checkpoints": "c", "session_events": "f"}
"""The tables of PostgreSQL that have a session's content, and what they are in Redis."""


class Vault(ABC):
    """Where a store that several processes share keeps its content, as one sees it who has no keys."""

    def __init__(self) -> None:
        self._opened: list[MovableStore] = []

    async def open(self, *ring: bytes) -> Any:
        """Return another store of the same content, with these keys."""
        store = self._make(KeyRing(list(ring)) if ring else None)
        await store.open(f"{BOOT}-{len(self._opened)}")
        self._opened.append(store)
        return store

    async def close(self) -> None:
        while self._opened:
            await self._opened.pop().close()

    @abstractmethod
    def _make(self, keys: KeyRing | None) -> MovableStore: ...

    @abstractmethod
    async def dump(self) -> bytes:
        """Return all that is stored, as it is."""

    @abstractmethod
    async def swap(self, table: str, one: Session, other: Session) -> None:
        """Put what one session has in a table into the place of what the other has, and the reverse."""


class PostgresVault(Vault):
    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url

    def _make(self, keys: KeyRing | None) -> MovableStore:
        return PostgresStore(self._url, LIFE, accept_volatile=True, keys=keys)

    async def dump(self) -> bytes:
        connection = await asyncpg.connect(self._url)
        tables = await connection.fetch(
            "SELECT relname FROM pg_class"
            " WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"
        )
        values: list[Any] = []
        for (table,) in tables:
            for row in await connection.fetch(f"SELECT * FROM {table}"):
                values += row
        await connection.close()
        return b"\n".join(value if isinstance(value, bytes) else str(value).encode() for value in values)

    async def swap(self, table: str, one: Session, other: Session) -> None:
        connection = await asyncpg.connect(self._url)
        numbers = [
            await connection.fetchval("SELECT id FROM sessions WHERE uid = $1", bytes.fromhex(uid))
            for uid in (one.uid.replace("-", ""), other.uid.replace("-", ""))
        ]
        for was, becomes in ((numbers[0], -1), (numbers[1], numbers[0]), (-1, numbers[1])):
            await connection.execute(f"UPDATE {table} SET session = $2 WHERE session = $1", was, becomes)
        await connection.close()


class RedisVault(Vault):
    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._prefix = fresh_prefix()

    def _make(self, keys: KeyRing | None) -> MovableStore:
        return RedisStore(self._url, LIFE, prefix=self._prefix, keys=keys)

    async def dump(self) -> bytes:
        client = Redis.from_url(self._url)
        found: list[bytes] = []
        async for name in client.scan_iter(f"{self._prefix}:*"):
            match await client.type(name):
                case b"string":
                    value: Any = [await client.get(name)]
                case b"hash":
                    value = [part for pair in (await client.hgetall(name)).items() for part in pair]
                case b"zset":
                    value = await client.zrange(name, 0, -1)
                case other:
                    raise AssertionError(f"{name} is of a type that nobody looks into: {other}")
            found += [name, *value]
        await client.aclose()
        return b"\n".join(found)

    async def swap(self, table: str, one: Session, other: Session) -> None:
        client = Redis.from_url(self._url)
        first, second = (
            f"{self._prefix}:{{{names.tag_of(session.key)}}}:{ROOMS[table]}" for session in (one, other)
        )
        for was, becomes in ((first, "between"), (second, first), ("between", second)):
            await client.rename(was, becomes)
        await client.aclose()


def postgres_vault(request: pytest.FixtureRequest) -> Vault:
    return PostgresVault(request.getfixturevalue("postgres_url"))


def redis_vault(request: pytest.FixtureRequest) -> Vault:
    return RedisVault(request.getfixturevalue("redis_server").url)


@pytest.fixture(params=[postgres_vault, redis_vault])
async def vault(request: pytest.FixtureRequest) -> AsyncIterator[Vault]:
    vault = request.param(request)
    yield vault
    await vault.close()


@pytest.fixture(params=[postgres_vault, redis_vault])
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Vault]:
    vault = request.param(request)
    yield vault
    await vault.close()


def shown(dump: bytes) -> set[str]:
    return {text for text in SAID if text.encode() in dump}


async def live(store: MovableStore, session: Session) -> tuple[Session, Note]:
    """Do to a session what leaves a row of every kind; return it then, and its note."""
    session = await store.patch_state(session.key, {"mood": "merry"}, session.updated_at + 1)
    turn = make_turn(session, "Who are you?", "Nobody.", started_at=session.updated_at + 1)
    assert await store.start_turn(session, running(turn)) is None
    session = await store.commit_turn(session, turn)
    await store.add_checkpoint(session, make_checkpoint(label="here", data={"x": 1}))
    note = make_note(session.head or "", "They met.")
    return await store.add_note(session, note, Usage(1, 1)), note


async def read(store: MovableStore, session: Session) -> list[Any]:
    """Return what the store tells of what ``live`` left."""
    return [
        await store.find_session(session.key),
        await store.list_branch(session, 9),
        await store.get_note(session),
        await store.list_checkpoints(session, 9),
        await store.list_entries(session, None, 9, newest_first=False),
        await store.at_turn(session, session.head),
    ]


@pytest.mark.parametrize("ring", [(NEW,), ()])
async def test_nothing_that_is_stored_tells(vault: Vault, ring: tuple[bytes, ...]) -> None:
    """With keys no value holds anything of what was said or given; without them all of it is found."""
    store = await vault.open(*ring)
    await fill(store)
    session = await stored_session(store, "runs")
    failing = make_turn(session, "regenerated", messages=(), status=TurnStatus.FAILED, reply=None)
    failing = replace(failing, error=TurnError("X", "The model does not answer"), finish_reason=None)
    await store.start_turn(session, running(make_turn(session, "other root")))
    await store.record_turn(session, failing)
    assert shown(await vault.dump()) == (set() if ring else set(SAID))


async def test_no_fingerprint_tells_a_guess_from_the_truth(vault: Vault) -> None:
    """With keys it is encrypted, also one that was stored before them once its session is loaded again."""
    asked = fingerprint("my pin is 4711")
    plain = await vault.open()
    session = await stored_session(plain, "before")
    turn = make_turn(session, binding=Binding("", "old", asked))
    await plain.start_turn(session, running(turn))
    await plain.commit_turn(session, turn)
    sealing = await vault.open(NEW)
    other = await stored_session(sealing, "after")
    turn = make_turn(other, binding=Binding("", "new", asked))
    await sealing.start_turn(other, running(turn))
    await sealing.commit_turn(other, turn)
    for name in ("old", "new"):
        assert (await sealing.find_bound("", name)).fingerprint == asked
    dump = await sealing.dump_session(session.key)
    await sealing.load_session(dump)
    stored = await vault.dump()
    assert asked not in stored
    assert asked.hex().encode() not in stored
    for name in ("old", "new"):
        assert (await sealing.find_bound("", name)).fingerprint == asked
    without = await vault.open(OLD)
    with pytest.raises(SnapshotUnreadable):
        await without.find_bound("", "new")


async def test_nodes_in_the_midst_of_a_rotation_read_each_other(vault: Vault) -> None:
    """One writes with the new key, the other still with the old one: each reads and continues the other's."""
    one, other = await vault.open(NEW, OLD), await vault.open(OLD, NEW)
    full = await fill(one)
    assert await all_reads(other, full) == await all_reads(one, full)
    session = await stored_session(one, "both", title="Ours", state={"n": 0}, user_id="u")
    for number, store in enumerate((other, one, other, one), 1):
        session = await current(store, session)
        session = await store.patch_state(session.key, {"n": number}, session.updated_at + 1)
        turn = make_turn(session, f"turn {number}", started_at=session.updated_at + 1)
        await store.start_turn(session, running(turn))
        session = await store.commit_turn(session, turn)
        await store.patch_shared(StateScope("default", "", "u"), {"n": number}, T0)
    session = await other.update_session(session.key, SessionChange(title="Theirs"), session.updated_at + 1)
    assert await read(one, session) == await read(other, session)
    assert (await one.load_path(session)).messages == (await other.load_path(session)).messages
    assert (session.title, session.state, session.depth) == ("Theirs", {"n": 4}, 4)


async def test_a_missing_key_sets_its_sessions_aside(vault: Vault) -> None:
    """They are unreadable, not listed and can be deleted; those under the key that is there go on."""
    before = await vault.open(OLD)
    lost, _ = await live(before, await stored_session(before, "lost", title="both", user_id="u"))
    await before.patch_shared(StateScope("default", "", "u"), {"a": 1}, T0)
    after = await vault.open(NEW)
    kept, note = await live(after, await stored_session(after, "kept", title="both", user_id="u"))
    with pytest.raises(SnapshotUnreadable) as caught:
        await after.find_session(lost.key)
    assert caught.value.session_id == "lost"
    for call in (
        after.load_path(lost),
        after.start_turn(lost, running(make_turn(lost))),
        after.touch_session(lost.key, T0),
        after.get_note(lost),
        after.get_shared(StateScope("default", "", "u")),
    ):
        with pytest.raises(SnapshotUnreadable):
            await call
    assert await after.leases.holder(lost.key) is None
    for text in (None, "both"):
        page = await after.list_sessions(SessionQuery(owner="", now=T0, text=text))
        assert [session.key for session in page.sessions] == [kept.key]
    assert (await after.list_checkpoints(lost, 9)).checkpoints == ()
    assert await after.get_note(kept) == note
    assert (await after.load_path(kept)).summary == note.summary
    assert await read(before, lost)
    assert await after.delete_session(lost.key)
    assert await after.find_session(lost.key) is None


async def test_keys_may_come_later(vault: Vault) -> None:
    """What was stored without them is read and goes on; whatever is written from then on is encrypted."""
    plain = await vault.open()
    full = await fill(plain)
    before = await all_reads(plain, full)
    sealing = await vault.open(NEW)
    assert await all_reads(sealing, full) == before
    origin = await current(sealing, make_session("tree"))
    fresh = make_turn(origin, "from now on", "in secret", started_at=LATER)
    session = await sealing.commit_turn(origin, fresh)
    session = await sealing.patch_state(session.key, {"hidden": "in a state"}, session.updated_at + 1)
    await sealing.update_session(session.key, SessionChange(title="in a title"), session.updated_at + 1)
    dump = await vault.dump()
    assert not [text for text in (b"from now on", b"in secret", b"in a state", b"in a title") if text in dump]
    assert {"other root", "Later."} <= shown(dump)
    with pytest.raises(SnapshotUnreadable):
        await plain.find_session(session.key)


async def test_a_turn_whose_node_is_gone_is_ended_without_its_key(vault: Vault) -> None:
    """The database itself ends it, and does not need to read it; whoever has the key reads what was asked."""
    one = await vault.open(OLD)
    session = await stored_session(one, "left")
    turn = make_turn(session, "Are you there?")
    await one.start_turn(session, running(turn))
    await one.close()
    await vault.open(NEW)
    after = await vault.open(OLD)
    left = await after.get_turn(session, turn.turn_id)
    assert (left.status, left.input) == (TurnStatus.FAILED, "Are you there?")
    assert left.error is not None
    assert left.error.code == "INTERRUPTED"


@pytest.mark.parametrize("title", ["", "\x03sealed?", "\x00", "\xff\xfe", "\ufeff", "{}"])
async def test_no_title_is_taken_for_an_encrypted_one(vault: Vault, title: str) -> None:
    """Whatever it begins with, a plain one is read as it is where others are encrypted; so is its twin."""
    plain = await vault.open()
    session = await stored_session(plain, "plain", title=title)
    sealing = await vault.open(NEW)
    assert await sealing.find_session(session.key) == session
    twin = await stored_session(sealing, "twin", title=title)
    assert await sealing.find_session(twin.key) == twin
    if title:
        page = await sealing.list_sessions(SessionQuery(owner="", now=T0, text=title))
        assert {found.key for found in page.sessions} == {session.key, twin.key}


async def test_all_is_encrypted_once_it_is_loaded_again(vault: Vault) -> None:
    """A store with keys that takes its own dumps leaves nothing that can be read, and nothing is lost."""
    plain = await vault.open()
    full = await fill(plain)
    before = await all_reads(plain, full)
    sealing = await vault.open(NEW)
    rest = await sealing.dump_rest()
    for key in await sealing.list_after(None, 99):
        dump = await sealing.dump_session(key)
        await sealing.load_session(dump)
    await sealing.load_rest(rest)
    assert shown(await vault.dump()) == set()
    assert await all_reads(sealing, full) == before


@pytest.mark.parametrize("table", ROOMS)
async def test_no_row_counts_for_another_session(vault: Vault, table: str) -> None:
    """Rows of a session and of its fork that are equal but for whose they are do not pass for each other."""
    store = await vault.open(NEW)
    session, note = await live(store, await stored_session(store, "one"))
    fork = await store.fork_session(session, ToTurn(session.head), make_session("two"))
    fork = await store.patch_state(fork.key, {"mood": "sad"}, fork.updated_at + 1)
    checkpoint = (await store.list_checkpoints(session, 9)).checkpoints[0]
    await store.add_checkpoint(fork, checkpoint)
    assert await store.get_note(fork) == note
    await vault.swap(table, session, fork)
    for swapped in (session, fork):
        match table:
            case "turns":
                with pytest.raises(SnapshotUnreadable):
                    await store.get_turn(swapped, swapped.head or "")
                with pytest.raises(SnapshotUnreadable):
                    await store.list_branch(swapped, 9)
            case "states":
                with pytest.raises(SnapshotUnreadable):
                    await store.at_turn(swapped, swapped.head)
            case "notes":
                with pytest.raises(SnapshotUnreadable):
                    await store.get_note(swapped)
            case "checkpoints":
                assert (await store.list_checkpoints(swapped, 9)).checkpoints == ()
            case _:
                told = await store.list_entries(swapped, None, 9, newest_first=False)
                assert [entry.turn_id for entry in told] == [swapped.head]


@pytest.fixture
def few_looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (search, listing):
        monkeypatch.setattr(module, "LOOK_LIMIT", 20)
        monkeypatch.setattr(module, "STEP_SESSIONS", 10)
    return


@pytest.mark.usefixtures("few_looks")
async def test_a_search_opens_so_many_titles_for_a_page(database: Vault) -> None:
    """A page may then be empty; its cursor goes on, every session is found once, and the total is unknown."""
    store = await database.open(NEW)
    sessions = [
        make_session(f"s{number}", now=T0 + number, title="Straße" if number in (3, 31) else "other")
        for number in range(45)
    ]
    await store.create_sessions(sessions)
    found, cursor, pages = [], None, 0
    while pages == 0 or cursor is not None:
        query = SessionQuery(owner="", now=T0, limit=5, cursor=cursor, text="STRASSE")
        page = await store.list_sessions(query)
        assert page.total is None
        found += [session.key.session_id for session in page.sessions]
        cursor, pages = page.next_cursor, pages + 1
    assert (found, pages) == (["s31", "s3"], 3)


async def test_a_search_by_id_and_title_is_exact(database: Vault) -> None:
    """Pages are full, in the order of activity, with the number of all that fit."""
    store = await database.open(NEW)
    for number in range(25):
        await stored_session(store, f"s{number}", now=T0 + number, title="x" if number % 2 else None)
    query = SessionQuery(owner="", now=T0, limit=5, text="X")
    first = await store.list_sessions(query)
    second = await store.list_sessions(replace(query, cursor=first.next_cursor))
    last = await store.list_sessions(replace(query, cursor=second.next_cursor))
    assert [session.key.session_id for session in (*first.sessions, *second.sessions, *last.sessions)] == [
        f"s{number}" for number in range(23, 0, -2)
    ]
    assert (first.total, second.total, last.next_cursor) == (12, 12, None)
    by_id = await store.list_sessions(SessionQuery(owner="", now=T0, text="s2"))
    assert by_id.total == 6
