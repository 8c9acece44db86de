"""SQLite with keys: what is encrypted, what a missing key does, and that no row counts in another's place."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import apsw
import pytest

from app.domain.branch import ToTurn
from app.domain.errors import SnapshotUnreadable
from app.domain.idempotency import Binding, fingerprint
from app.domain.ids import SessionKey
from app.domain.session import Session, SessionChange, SessionQuery
from app.domain.state import StateScope
from app.domain.turn import TurnError, TurnStatus, Usage
from app.stores import session_texts
from app.stores.keyring import ID_BYTES, KeyRing
from app.stores.sealing import ENCRYPTED, Sealer
from app.stores.sqlite import search as sqlite_search
from app.stores.sqlite.store import SqliteStore

from .builders import (
    LIFE,
    T0,
    extend,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    running,
    stored_session,
)
from .moving import all_reads, copy_all, dumped, fill

OLD, NEW = b"o" * 32, b"n" * 32
SEALED_TEXTS = ("title", "params", "metadata", "template", "state")
BODIES = ("turns", "states", "notes", "checkpoints", "session_events", "shared_state")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "agentpool.db")


Opened = Callable[..., Awaitable[SqliteStore]]


@pytest.fixture
async def opened(path: str) -> AsyncIterator[Opened]:
    """Close the file and open it again, each time with these keys only, as another process."""
    stores: list[SqliteStore] = []

    async def open_with(*keys: bytes) -> SqliteStore:
        if stores:
            await stores[-1].close()
        stores.append(SqliteStore(path, LIFE, keys=KeyRing([*keys]) if keys else None))
        await stores[-1].open(f"boot-{len(stores)}")
        return stores[-1]

    yield open_with
    await stores[-1].close()


def change(path: str, sql: str) -> None:
    """Change the file behind the store's back."""
    connection = apsw.Connection(path)
    connection.execute(sql)
    assert connection.changes()
    connection.close()


def stored(path: str) -> list[Any]:
    """Return everything in the file that is to be sealed, as it is there."""
    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    found = [row[0] for table in BODIES for row in connection.execute(f"SELECT body FROM {table}")]
    found += [
        value
        for row in connection.execute(f"SELECT {', '.join(SEALED_TEXTS)} FROM sessions")
        for value in row
    ]
    connection.close()
    return [value for value in found if value is not None]


async def twins(store: SqliteStore) -> tuple[Session, Session]:
    """Return a session with some of everything and a fork of it, which has the same turns' ids."""
    session = await stored_session(store, "origin", state={"a": 1}, title="Mine")
    session, turns = await extend(store, session, 3)
    session = await store.add_note(session, make_note(turns[1].turn_id), Usage())
    fork = await store.fork_session(session, ToTurn(session.head), make_session("fork", title="Yours"))
    for one in (session, fork):
        await store.add_checkpoint(one, make_checkpoint(label="here"))
        await store.patch_state(one.key, {"b": 2}, T0 + 9000)
    return session, fork


@pytest.mark.parametrize("keys", [(), (NEW,)], ids=["checksum", "encrypted"])
@pytest.mark.parametrize(
    ("sql", "read"),
    [
        (
            "UPDATE turns SET body = (SELECT body FROM turns AS o WHERE o.turn_id = turns.turn_id"
            " AND o.session = 2) WHERE session = 1",
            lambda store, session: store.load_path(session),
        ),
        (
            "UPDATE turns SET body = (SELECT body FROM turns AS o WHERE o.session = 1"
            " AND o.turn_id = turns.parent) WHERE session = 1 AND depth = 3",
            lambda store, session: store.load_path(session),
        ),
        (
            "UPDATE states SET body = (SELECT body FROM states AS o WHERE o.number = states.number"
            " AND o.session = 2) WHERE session = 1",
            lambda store, session: store.at_turn(session, None),
        ),
        (
            "UPDATE notes SET body = (SELECT body FROM notes AS o WHERE o.session = 2) WHERE session = 1",
            lambda store, session: store.get_note(session),
        ),
        (
            "UPDATE checkpoints SET body = (SELECT body FROM checkpoints AS o WHERE o.session = 2)"
            " WHERE session = 1",
            lambda store, session: _first_checkpoint(store, session),
        ),
        (
            "UPDATE session_events SET body = (SELECT body FROM session_events AS o WHERE o.session = 2)"
            " WHERE session = 1",
            lambda store, session: store.dump_session(session.key),
        ),
        (
            "UPDATE sessions SET title = (SELECT title FROM sessions AS o WHERE o.id = 2) WHERE id = 1",
            lambda store, session: store.dump_session(session.key),
        ),
    ],
    ids=["turn of a fork", "turn", "state", "note", "checkpoint", "event", "title"],
)
async def test_no_row_counts_in_the_place_of_another(
    opened: Opened,
    path: str,
    keys: tuple[bytes, ...],
    sql: str,
    read: Callable[[SqliteStore, Session], Awaitable[Any]],
) -> None:
    """What is sealed for one session, and one turn, is SNAPSHOT_UNREADABLE elsewhere."""
    store = await opened(*keys)
    session, fork = await twins(store)
    assert await read(store, session)
    change(path, sql)
    with pytest.raises(SnapshotUnreadable) as caught:
        await read(store, session)
    assert caught.value.session_id == "origin"
    assert (await store.load_path(fork)).messages


async def _first_checkpoint(store: SqliteStore, session: Session) -> Any:
    connection = apsw.Connection(store._path, flags=apsw.SQLITE_OPEN_READONLY)
    raw = connection.execute("SELECT checkpoint_id FROM checkpoints WHERE session = 1").get
    connection.close()
    return await store.get_checkpoint(session, raw.hex())


@pytest.mark.parametrize(
    "place",
    [
        (SessionKey("o", "s"), bytes(16), "metadata"),
        (SessionKey("p", "s"), bytes(16), "params"),
        (SessionKey("o", "t"), bytes(16), "params"),
        (SessionKey("o", "s"), b"x" * 16, "params"),
    ],
)
def test_a_text_counts_in_its_own_column_only(place: tuple[SessionKey, bytes, str]) -> None:
    """Neither another column, nor another owner, id or incarnation of the session reads it."""
    sealer, session = Sealer(KeyRing([NEW])), make_session("s", owner="o", params={"seed": 1})
    _, params, *empty = session_texts.to_texts(sealer, session, bytes(16))
    assert empty == [None, None, None]
    assert session_texts.from_text(sealer, session.key, bytes(16), "params", params) == {"seed": 1}
    with pytest.raises(SnapshotUnreadable):
        session_texts.from_text(sealer, *place, params)


@pytest.mark.parametrize("column", ["title", "metadata"])
def test_a_text_of_another_kind_is_unreadable(column: str) -> None:
    """An object is no title, and a title no object, though the seal were right."""
    sealer, key = Sealer(KeyRing([NEW])), SessionKey("", "s")
    session = make_session("s", title="text", metadata={"a": 1})
    title, _, metadata, *_ = session_texts.to_texts(sealer, session, bytes(16))
    assert session_texts.from_title(sealer, key, bytes(16), title) == "text"
    cover = session_texts._cover(key, bytes(16), column)
    wrong = sealer.seal(b"\x01[]", cover)
    with pytest.raises(SnapshotUnreadable):
        if column == "title":
            session_texts.from_title(sealer, key, bytes(16), wrong)
        else:
            session_texts.from_text(sealer, key, bytes(16), column, wrong)
    assert session_texts.from_text(sealer, key, bytes(16), "metadata", metadata) == {"a": 1}


async def test_all_that_is_stored_with_keys_is_encrypted(opened: Opened, path: str) -> None:
    """Nothing that anybody said, and nothing that hangs on it, is there in another form."""
    store = await opened(NEW)
    await fill(store)
    await store.close()
    assert {bytes(value)[0] for value in stored(path)} == {ENCRYPTED}
    connection = apsw.Connection(path)
    sessions, titles, folded = connection.execute(
        "SELECT count(*), count(title), count(title_folded) FROM sessions"
    ).get
    connection.close()
    assert (sessions, folded) == (titles, 0)


async def test_a_plain_store_goes_on_encrypted(opened: Opened, path: str) -> None:
    """With its first keys everything reads as before; what is written from then on is encrypted."""
    store = await opened()
    full = await fill(store)
    reads, given = await all_reads(store, full), await dumped(store)
    store = await opened(NEW)
    assert await all_reads(store, full) == reads
    assert await dumped(store) == given
    session = await store.find_session(full.keys[0])
    assert session is not None
    plain = len([value for value in stored(path) if isinstance(value, str) or value[0] != ENCRYPTED])
    await store.commit_turn(session, make_turn(session, started_at=session.updated_at + 1000))
    await store.update_session(session.key, SessionChange(metadata={"a": 1}), session.updated_at + 2000)
    left = len([value for value in stored(path) if isinstance(value, str) or value[0] != ENCRYPTED])
    texts = (session.title, session.params, session.metadata, session.template, session.state)
    assert left == plain - len([text for text in texts if text])


async def test_a_rotated_store_needs_its_new_key_only(opened: Opened, path: str) -> None:
    """A ring of two reads what either wrote; stored again, everything reads with the first alone."""
    store = await opened(OLD)
    full = await fill(store)
    given = await dumped(store)
    store = await opened(NEW, OLD)
    reads = await all_reads(store, full)
    assert await dumped(store) == given
    await copy_all(store, store)
    await store.scrub()
    store = await opened(NEW)
    assert await all_reads(store, full) == reads
    assert await dumped(store) == given
    # Behind the format's byte: which key it needs.
    assert {value[1 : 1 + ID_BYTES] for value in stored(path)} == {sha256(NEW).digest()[:ID_BYTES]}


async def test_scrubbing_leaves_nothing_of_what_was_replaced(opened: Opened, path: str) -> None:
    """A text that was stored plainly is in no part of the files once all is encrypted and scrubbed."""
    store = await opened()
    session = await stored_session(store, title="a marker")
    session, _ = await extend(store, session, 20, messages=(), reply="a marker")
    gone = await stored_session(store, "gone", metadata={"a": "marker" * 1000})
    await store.delete_session(gone.key)
    store = await opened(NEW)
    await copy_all(store, store)
    await store.ping()
    assert b"marker" in raw(path)
    await store.scrub()
    assert b"marker" not in raw(path)
    assert (await store.list_turns(session, 1)).turns[0].reply == "a marker"


def raw(path: str) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(Path(path).parent.iterdir()))


async def test_without_its_key_a_session_is_unreadable(opened: Opened) -> None:
    """Every read says so, lists leave it out, others go on, it can be deleted; with the key it is back."""
    store = await opened(OLD)
    hidden, turns = await extend(store, await stored_session(store, "hidden"), 2)
    await store.patch_shared(StateScope("app"), {"a": 1}, T0)
    doomed = await stored_session(store, "doomed")
    for keys in ((NEW,), ()):
        store = await opened(*keys)
        for refused in (
            store.find_session(hidden.key),
            store.load_path(hidden),
            store.commit_turn(hidden, make_turn(hidden)),
            store.touch_session(hidden.key, T0),
            store.get_turn(hidden, turns[0].turn_id),
            store.fork_session(hidden, None, make_session("fork")),
            store.dump_session(hidden.key),
            store.get_shared(StateScope("app")),
            store.dump_rest(),
        ):
            with pytest.raises(SnapshotUnreadable):
                await refused
        well, _ = await extend(store, await stored_session(store, f"well {len(keys)}"), 1)
        listed = await store.list_sessions(SessionQuery(owner="", now=T0))
        assert "hidden" not in {one.key.session_id for one in listed.sessions}
        assert well.key in {one.key for one in listed.sessions}
        page = await store.list_turns(hidden, 9)
        assert {turn.error and turn.error.code for turn in page.turns} == {"SNAPSHOT_UNREADABLE"}
        await store.delete_session(doomed.key)
    store = await opened(NEW, OLD)
    assert (await store.load_path(hidden)).messages[-1] == turns[-1].messages[-1]
    assert await store.find_session(doomed.key) is None


async def test_a_turn_that_ran_waits_for_its_key(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    """A start without its key leaves the start record alone; the first with it ends the turn."""
    store = await opened(OLD)
    session = await stored_session(store)
    turn = make_turn(session, "a secret", boot_id="boot-1")
    await store.start_turn(session, running(turn))
    with caplog.at_level(logging.ERROR):
        store = await opened(NEW)
    assert "start record of a turn cannot be decrypted" in caplog.text
    store = await opened(NEW, OLD)
    told = await store.get_turn(session, turn.turn_id)
    assert (told.status, told.input) == (TurnStatus.FAILED, "a secret")
    assert told.error == TurnError("INTERRUPTED", "The process died while the turn ran.")


async def test_a_search_looks_at_so_many_titles_for_a_page(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page everything is found once; while one look does not see all, the total is not told."""
    store = await opened(NEW)
    for number in range(30):
        title = f"Größe {number}" if number % 7 == 0 else None
        await stored_session(store, f"s{number}", title=title, now=T0 + number // 3)
    monkeypatch.setattr(sqlite_search, "LOOK_LIMIT", 4)
    assert await found(store, "GRÖSSE", None) == ["s28", "s21", "s14", "s7", "s0"]
    assert await found(store, "s1", None) == [f"s{n}" for n in (19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 1)]
    monkeypatch.setattr(sqlite_search, "LOOK_LIMIT", 31)
    assert await found(store, "größe", 5) == ["s28", "s21", "s14", "s7", "s0"]
    assert await found(store, "nothing", 0) == []


async def found(store: SqliteStore, text: str, total: int | None) -> list[str]:
    """Return what a search finds in pages of two, each of which tells the same total."""
    ids: list[str] = []
    query = SessionQuery(owner="", now=T0, text=text, limit=2)
    for _ in range(20):
        page = await store.list_sessions(query)
        assert page.total == total
        assert len(page.sessions) <= 2
        ids += [session.key.session_id for session in page.sessions]
        if page.next_cursor is None:
            return ids
        query = replace(query, cursor=page.next_cursor)
    raise AssertionError("the pages do not end")


async def test_a_search_passes_over_titles_without_a_key(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """They are counted in one line of the log; plain titles from before the keys are found as ever."""
    store = await opened()
    await stored_session(store, "plain", title="A tale")
    store = await opened(OLD)
    for number in range(3):
        await stored_session(store, f"old{number}", title="A tale")
    store = await opened(NEW)
    await stored_session(store, "new", title="A TALE")
    with caplog.at_level(logging.ERROR):
        page = await store.list_sessions(SessionQuery(owner="", now=T0, text="tale"))
    assert {session.key.session_id for session in page.sessions} == {"plain", "new"}
    assert page.total == 2
    assert "3 titles are unreadable" in caplog.text


async def test_no_checksum_tells_about_a_secret(opened: Opened, path: str) -> None:
    """The same record has another seal each time, since that is over what is stored, not over the text."""
    store = await opened(NEW)
    seals = set()
    session = make_session(title="guess me")
    for _ in range(2):
        await store.create_session(session)
        connection = apsw.Connection(path)
        seals.add(connection.execute("SELECT seal FROM sessions").get)
        connection.close()
        await store.delete_session(session.key)
    assert len(seals) == 2


async def test_no_fingerprint_tells_a_guess_from_the_truth(opened: Opened, path: str) -> None:
    """With keys it is encrypted, also one that was stored before them once its session is loaded again."""
    asked = fingerprint("my pin is 4711")
    for ring, name in (((), "old"), ((NEW,), "new")):
        store = await opened(*ring)
        session = await stored_session(store, name)
        turn = make_turn(session, binding=Binding("", name, asked))
        await store.start_turn(session, running(turn))
        await store.commit_turn(session, turn)
    for name in ("old", "new"):
        bound = await store.find_bound("", name)
        assert bound is not None
        assert bound.fingerprint == asked
    dump = await store.dump_session(SessionKey("", "old"))
    assert dump is not None
    await store.load_session(dump)
    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    stored = [row[0] for row in connection.execute("SELECT fingerprint FROM idempotency_keys")]
    connection.close()
    assert [(raw[0], asked in raw) for raw in stored] == [(ENCRYPTED, False)] * 2
    store = await opened(OLD)
    with pytest.raises(SnapshotUnreadable):
        await store.find_bound("", "new")
