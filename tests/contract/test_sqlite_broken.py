"""What becomes of rows that something else has changed: the session is set aside, the rest goes on."""

from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from app.domain.errors import SnapshotUnreadable
from app.domain.idempotency import Binding
from app.domain.session import Session, SessionChange, SessionQuery
from app.domain.turn import Turn, TurnError, TurnStatus
from app.stores.sqlite.store import SqliteStore

from .builders import BOOT, LIFE, T0, extend, make_session, make_turn, running

UNREADABLE = TurnError("SNAPSHOT_UNREADABLE", SnapshotUnreadable().detail)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "agentpool.db")


@pytest.fixture
async def store(path: str) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


async def _two_sessions(store: SqliteStore) -> tuple[Session, list[Turn], Session, list[Turn]]:
    hit, well = make_session("hit"), make_session("well")
    await store.create_session(hit)
    await store.create_session(well)
    hit, hit_turns = await extend(store, hit, 3)
    well, well_turns = await extend(store, well, 3)
    return hit, hit_turns, well, well_turns


@pytest.mark.parametrize(
    "damage",
    [
        "body = CAST(substr(body, 1, 20) || x'00' || substr(body, 22) AS BLOB)",
        "body = x''",
        "body = 'text'",
        "body = CAST(x'09' || substr(body, 2) AS BLOB)",
        "body = (SELECT body FROM turns AS o WHERE o.depth = 3 AND o.session = turns.session)",
        "parent = NULL",
        "parent = turn_id",
        "depth = depth + 1",
        "status = 3",
        "kept = 1",
        "provider = provider + 1",
        "agent = 'x'",
        "boot = 10000",
        "started_at = started_at + 1",
        "finished_at = NULL",
        "state = 1",
        "turn_id = zeroblob(16)",
    ],
)
async def test_a_broken_turn_sets_its_session_aside(store: SqliteStore, path: str, damage: str) -> None:
    """Any changed column of a turn makes its path SnapshotUnreadable; the neighbour is untouched."""
    hit, hit_turns, well, well_turns = await _two_sessions(store)
    _break(path, f"UPDATE turns SET {damage} WHERE depth = 2 AND session = 1")
    with pytest.raises(SnapshotUnreadable) as caught:
        await store.load_path(hit)
    assert caught.value.session_id == "hit"
    with pytest.raises(SnapshotUnreadable):
        await store.list_branch(hit, 10)
    assert (await store.load_path(well)).messages == tuple(m for t in well_turns for m in t.messages)
    assert await store.get_turn(hit, hit_turns[0].turn_id)
    listed = {turn.turn_id: turn for turn in (await store.list_turns(hit, 10)).turns}
    assert [turn.error for turn in listed.values() if turn.status is TurnStatus.FAILED] == [UNREADABLE]
    assert [listed[turn.turn_id].reply for turn in hit_turns[::2]] == ["answer 0", "answer 2"]
    assert len((await store.list_sessions(SessionQuery(owner="", now=T0))).sessions) == 2
    assert (await store.commit_turn(well, make_turn(well))).depth == 4
    assert await store.delete_session(hit.key)


@pytest.mark.parametrize(
    ("damage", "ids"),
    [
        ("body = x''", [6, 5, 4, 3, 2, 1]),
        ("started_at = 4000000000000000000", [3, 6, 5, 4, 2, 1]),
        ("started_at = -5", [6, 5, 4, 2, 1, 3]),
        ("turn_id = x'00'", [6, 5, 4, 2, 1]),
        ("started_at = 'x'", [6, 5, 4, 2, 1]),
    ],
)
async def test_a_listing_goes_on_behind_a_broken_turn(
    store: SqliteStore, path: str, damage: str, ids: list[int]
) -> None:
    """Page by page each readable turn is listed once, whatever became of one between them."""
    session = make_session()
    await store.create_session(session)
    session, turns = await extend(store, session, 6)
    _break(path, f"UPDATE turns SET {damage} WHERE depth = 3")
    listed, cursor = [], None
    for _ in range(4):
        page = await store.list_turns(session, 2, cursor)
        listed += [turn.turn_id for turn in page.turns]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert listed == [turns[number - 1].turn_id for number in ids]


@pytest.mark.parametrize(
    "damage",
    ["title = 'x'", "head = zeroblob(16)", "head = NULL", "depth = 9", "metadata = '{'", "metadata = '[]'",
     "uid = x'00'", "archived = 1", "rev = rev + 1", "expires_at = NULL", "seal = seal + 4294967296",
     "agent_id = x'00'", "created_at = 'then'", "state = '{\"a\":1}'", "state_rev = 7", "state_number = 1",
     "root_state = 1", "note = zeroblob(16)"],
)  # fmt: skip
async def test_a_broken_record_sets_its_session_aside(store: SqliteStore, path: str, damage: str) -> None:
    """Any changed column of a record makes it SnapshotUnreadable, listings leave it out, delete works.

    What an open store still knows of it may be shown until the next start, but nothing builds on it.
    """
    hit, _, well, _ = await _two_sessions(store)
    _break(path, f"UPDATE sessions SET {damage} WHERE session_id = 'hit'")
    with pytest.raises(SnapshotUnreadable):
        await store.update_session(hit.key, SessionChange(title="new"), T0)
    await store.close()
    await store.open(BOOT)
    with pytest.raises(SnapshotUnreadable) as caught:
        await store.find_session(hit.key)
    assert caught.value.session_id == "hit"
    page = await store.list_sessions(SessionQuery(owner="", now=T0))
    assert [session.key for session in page.sessions] == [well.key]
    assert await store.delete_session(hit.key)


async def test_a_broken_start_record_does_not_keep_the_store_from_opening(
    store: SqliteStore, path: str
) -> None:
    """A start record that cannot be read is no longer running after the restart, and stays unreadable."""
    session = make_session()
    await store.create_session(session)
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    await store.close()
    _break(path, "UPDATE turns SET started_at = started_at + 1")
    await store.open("boot-2")
    with pytest.raises(SnapshotUnreadable):
        await store.get_turn(session, turn.turn_id)
    assert await store.expire_and_purge(T0 * 2, 10) == (1, 1)


@pytest.mark.parametrize(
    "harm",
    [
        "SET turn_id = randomblob(16)",
        "SET fingerprint = zeroblob(16)",
        "SET session = session + 1",
        "SET turn_id = 7",
        "SET created_at = 'x'",
    ],
)
async def test_a_broken_key_is_noticed(store: SqliteStore, path: str, harm: str) -> None:
    """A key's row that was changed behind the store's back raises SnapshotUnreadable, never a wrong turn."""
    session = make_session()
    await store.create_session(session)
    turn = make_turn(session, binding=Binding("", "k", b"f" * 16))
    await store.commit_turn(session, turn)
    _break(path, f"UPDATE idempotency_keys {harm}")
    with pytest.raises(SnapshotUnreadable):
        await store.find_bound("", "k")
    assert await store.delete_session(session.key)


def _break(path: str, sql: str) -> None:
    """Change the file behind the store's back."""
    connection = apsw.Connection(path)
    connection.execute(sql)
    connection.close()
