"""What becomes of changed rows beside the turns: states, notes, checkpoints, events, shared state."""

from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from app.domain.branch import ToCheckpoint, ToTurn
from app.domain.compaction import Note
from app.domain.errors import AgentPoolError, CheckpointNotFound, SnapshotUnreadable
from app.domain.journal import LoggedFact, position_of
from app.domain.session import Session
from app.domain.state import StateScope
from app.domain.turn import Turn, Usage
from app.stores.sqlite.store import SqliteStore

from .builders import (
    BOOT,
    LIFE,
    T0,
    current,
    extend,
    failed,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    stored_session,
)

FLIPPED = "body = CAST(substr(body, 1, 8) || x'00' || substr(body, 10) AS BLOB)"
BODIES = [FLIPPED, "body = x''", "body = 'text'", "body = CAST(x'09' || substr(body, 2) AS BLOB)"]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "agentpool.db")


@pytest.fixture
async def store(path: str) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path, LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


def _break(path: str, sql: str) -> None:
    """Change the file behind the store's back."""
    connection = apsw.Connection(path)
    connection.execute(sql)
    assert connection.changes() >= 1
    connection.close()


def _swap(table: str, column: str, key: str) -> str:
    """Give a row of the first session what the same one of the second has."""
    return (
        f"UPDATE {table} SET {column} = (SELECT {column} FROM {table} AS o"
        f" WHERE o.session = 2 AND o.{key} = {table}.{key}) WHERE session = 1"
    )


async def _with_states(store: SqliteStore, session_id: str) -> tuple[Session, list[Turn]]:
    """Return a session whose root and whose three turns each have another state."""
    session = await stored_session(store, session_id, state={"at": session_id})
    turns = []
    for number in range(3):
        session = await store.patch_state(session.key, {"n": number}, T0)
        turns.append(make_turn(session))
        session = await store.commit_turn(session, turns[-1])
    return session, turns


@pytest.mark.parametrize(
    "harm",
    [
        *(f"UPDATE states SET {body} WHERE session = 1 AND number = 2" for body in BODIES),
        "UPDATE states SET number = 9 WHERE session = 1 AND number = 2",
        "UPDATE states SET body = (SELECT body FROM states WHERE session = 1 AND number = 3)"
        " WHERE session = 1 AND number = 2",
        _swap("states", "body", "number") + " AND number = 2",
        "DELETE FROM states WHERE session = 1 AND number = 2",
    ],
)
async def test_a_broken_state_is_never_brought_back(store: SqliteStore, path: str, harm: str) -> None:
    """The turn that a broken state belongs to cannot be gone back to; all other places can."""
    hit, turns = await _with_states(store, "hit")
    well, well_turns = await _with_states(store, "well")
    _break(path, harm)
    target = ToTurn(turns[0].turn_id)
    for call in (
        lambda: store.at_turn(hit, turns[0].turn_id),
        lambda: store.move_head(hit, target, T0),
        lambda: store.fork_session(hit, None, make_session("fork")),
        lambda: store.commit_turn(hit, make_turn(hit, parent=turns[0].turn_id, depth=2), resets_state=True),
    ):
        with pytest.raises(SnapshotUnreadable) as caught:
            await call()
        assert caught.value.session_id == "hit"
    assert await current(store, hit) == hit
    assert store.session_count_nowait() == 2
    assert (await store.move_head(well, ToTurn(well_turns[0].turn_id), T0)).state == {"at": "well", "n": 0}
    assert (await store.move_head(hit, ToTurn(turns[1].turn_id), T0)).state == {"at": "hit", "n": 1}


@pytest.mark.parametrize("column", ["state = 1", "state = NULL", "state = 3"])
async def test_a_turn_never_names_another_state(store: SqliteStore, path: str, column: str) -> None:
    """A turn whose number of a state was changed is unreadable, whatever state is there."""
    hit, turns = await _with_states(store, "hit")
    _break(path, f"UPDATE turns SET {column} WHERE depth = 1")
    with pytest.raises(SnapshotUnreadable):
        await store.move_head(hit, ToTurn(turns[0].turn_id), T0)


@pytest.mark.parametrize("column", ["state_number = 2", "state_number = NULL", "root_state = 2"])
async def test_a_record_never_names_another_state(store: SqliteStore, path: str, column: str) -> None:
    """A record whose numbers of states were changed is set aside, for writes and for places alike."""
    hit, _ = await _with_states(store, "hit")
    _break(path, f"UPDATE sessions SET {column}")
    with pytest.raises(SnapshotUnreadable):
        await store.at_turn(hit, None)
    with pytest.raises(SnapshotUnreadable):
        await store.commit_turn(hit, make_turn(hit))
    await store.close()
    await store.open(BOOT)
    with pytest.raises(SnapshotUnreadable):
        await store.find_session(hit.key)


async def _noted(store: SqliteStore, session_id: str) -> tuple[Session, list[Turn], Note]:
    session, turns = await extend(store, await stored_session(store, session_id), 4)
    note = make_note(turns[1].turn_id, f"They met in {session_id}.")
    return await store.add_note(session, note, Usage()), turns, note


@pytest.mark.parametrize(
    "harm",
    [
        *(f"UPDATE notes SET {body} WHERE session = 1" for body in BODIES),
        *(
            f"UPDATE notes SET {column} WHERE session = 1"
            for column in (
                "depth = 3",
                "depth = 'x'",
                "tokens_before = 1",
                "tokens_after = 1",
                "created_at = 1",
                "note_id = zeroblob(16)",
                "turn_id = (SELECT turn_id FROM turns WHERE depth = 3 AND session = 1)",
                "turn_id = x'00'",
            )
        ),
        _swap("notes", "body", "depth"),
        "DELETE FROM notes WHERE session = 1",
    ],
)
async def test_a_broken_note_never_stands_for_a_path(store: SqliteStore, path: str, harm: str) -> None:
    """With any column of the note changed the path is unreadable; from before the note it is not."""
    hit, turns, _ = await _noted(store, "hit")
    well, _, note = await _noted(store, "well")
    _break(path, harm)
    with pytest.raises(SnapshotUnreadable) as caught:
        await store.load_path(hit)
    assert caught.value.session_id == "hit"
    before = await store.move_head(hit, ToTurn(turns[0].turn_id), T0)
    assert (await store.load_path(before)).messages == turns[0].messages
    assert (await store.load_path(well)).summary == "They met in well."
    assert await store.get_note(well) == note


@pytest.mark.parametrize("body", BODIES)
async def test_a_broken_note_is_not_shown(store: SqliteStore, path: str, body: str) -> None:
    """Asking for a note whose text was changed raises, as do forks that would take it along."""
    hit, turns, _ = await _noted(store, "hit")
    _break(path, f"UPDATE notes SET {body}")
    with pytest.raises(SnapshotUnreadable):
        await store.get_note(hit)
    with pytest.raises(SnapshotUnreadable):
        await store.fork_session(hit, None, make_session("fork"))
    assert (await store.fork_session(hit, ToTurn(turns[0].turn_id), make_session("fork"))).depth == 1


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        *((f"UPDATE checkpoints SET {body} WHERE id = 2", SnapshotUnreadable) for body in BODIES),
        ("UPDATE checkpoints SET state = 1 WHERE id = 2", SnapshotUnreadable),
        ("UPDATE checkpoints SET turn_id = NULL WHERE id = 2", SnapshotUnreadable),
        ("UPDATE checkpoints SET automatic = 1 WHERE id = 2", SnapshotUnreadable),
        ("UPDATE checkpoints SET automatic = 'x' WHERE id = 2", SnapshotUnreadable),
        ("UPDATE checkpoints SET created_at = created_at + 1 WHERE id = 2", SnapshotUnreadable),
        ("UPDATE checkpoints SET body = (SELECT body FROM checkpoints WHERE id = 1) WHERE id = 2",
         SnapshotUnreadable),
        ("UPDATE checkpoints SET checkpoint_id = x'00' WHERE id = 2", CheckpointNotFound),
        ("UPDATE checkpoints SET session = 2 WHERE id = 2", CheckpointNotFound),
    ],
)  # fmt: skip
async def test_a_broken_checkpoint_is_noticed(
    store: SqliteStore, path: str, harm: str, error: type[AgentPoolError]
) -> None:
    """It can neither be shown nor restored, a listing leaves it out, and all can be deleted."""
    hit, _ = await _with_states(store, "hit")
    other = await stored_session(store, "other")
    made = []
    for number in range(3):
        made.append(await store.add_checkpoint(hit, make_checkpoint(created_at=T0 + 10 * number)))
        hit = await store.patch_state(hit.key, {"n": -number}, T0)
    _break(path, harm)
    broken = made[1].checkpoint_id
    for call in (
        lambda: store.get_checkpoint(hit, broken),
        lambda: store.move_head(hit, ToCheckpoint(broken), T0),
        lambda: store.fork_session(hit, ToCheckpoint(broken), make_session("fork")),
    ):
        with pytest.raises(error):
            await call()
    assert await current(store, hit) == hit
    listed, cursor = [], None
    for _ in range(3):
        page = await store.list_checkpoints(hit, 1, cursor)
        listed += page.checkpoints
        cursor = page.next_cursor
        if cursor is None:
            break
    assert listed == [made[2], made[0]]
    assert (await store.list_checkpoints(other, 10)).checkpoints == ()
    assert await store.delete_checkpoints(hit) >= 2
    assert (await store.list_checkpoints(hit, 10)).total == 0


@pytest.mark.parametrize(
    "column",
    [
        *BODIES,
        "number = 9",
        "number = 'x'",
        "created_at = created_at + 1",
        "created_at = 'then'",
        "created_at = -1",
        "created_at = 4000000000000000000",
        "body = (SELECT body FROM session_events WHERE number = 2)",
    ],
)
async def test_a_broken_event_is_left_out(store: SqliteStore, path: str, column: str) -> None:
    """Its neighbours are listed in full pages, both ways, and events go on to be logged."""
    session = await stored_session(store)
    for number in range(5):
        session = await store.patch_state(session.key, {"n": number}, T0 + number)
    _break(path, f"UPDATE session_events SET {column} WHERE number = 3")
    for newest_first in (False, True):
        numbers, position = [], None
        for _ in range(3):
            page = await store.list_entries(session, position, 2, newest_first=newest_first)
            numbers += [entry.number for entry in page if isinstance(entry, LoggedFact)]
            if len(page) < 2:
                break
            position = position_of(page[-1])
        assert numbers == ([5, 4, 2, 1] if newest_first else [1, 2, 4, 5])
    await store.patch_state(session.key, {"n": 6}, T0 + 6)
    newest = (await store.list_entries(session, None, 1, newest_first=True))[0]
    assert isinstance(newest, LoggedFact)
    assert newest.created_at == T0 + 6


@pytest.mark.parametrize(
    ("column", "shown"),
    [("body = x''", 3), ("depth = 9", 3), ("started_at = -5", 2), ("started_at = 4000000000000000000", 2),
     ("started_at = 'x'", 2), ("turn_id = x'00'", 2)],
)  # fmt: skip
async def test_a_story_goes_on_behind_a_broken_turn(
    store: SqliteStore, path: str, column: str, shown: int
) -> None:
    """It is told as failed where it began, or left out if that is unknown; every other once, both ways."""
    session, turns = await extend(store, await stored_session(store), 2)
    turns.append(failed(make_turn(session)))
    await store.record_turn(session, turns[-1])
    _break(path, f"UPDATE turns SET {column} WHERE depth = 2")
    for newest_first in (False, True):
        told, position = [], None
        for _ in range(4):
            page = await store.list_entries(session, position, 1, newest_first=newest_first)
            if not page:
                break
            told += [entry.turn_id for entry in page if isinstance(entry, Turn)]
            position = position_of(page[-1])
        expected = [turn.turn_id for turn in turns if shown == 3 or turn is not turns[1]]
        assert told == (expected[::-1] if newest_first else expected)


@pytest.mark.parametrize(
    "harm",
    [
        *(f"UPDATE shared_state SET {body} WHERE user_id = 'u'" for body in BODIES),
        "UPDATE shared_state SET rev = rev + 1 WHERE user_id = 'u'",
        "UPDATE shared_state SET updated_at = 'x' WHERE user_id = 'u'",
        "UPDATE shared_state SET body = (SELECT body FROM shared_state AS o WHERE o.user_id = 'v')"
        " WHERE user_id = 'u'",
        "UPDATE shared_state SET body = (SELECT body FROM shared_state AS o WHERE o.user_id = '')"
        " WHERE user_id = 'u'",
        "UPDATE shared_state SET user_id = 'w' WHERE user_id = 'u';"
        "UPDATE shared_state SET user_id = 'u' WHERE user_id = 'v'",
    ],
)
async def test_broken_shared_state_is_noticed(store: SqliteStore, path: str, harm: str) -> None:
    """It is neither shown nor patched, nor shown to another; that of the application stays readable."""
    scopes = [StateScope("default", "", user_id) for user_id in ("u", "v", None)]
    for scope in scopes:
        await store.patch_shared(scope, {"of": str(scope.user_id)}, T0)
    _break(path, harm)
    with pytest.raises(SnapshotUnreadable):
        await store.get_shared(scopes[0])
    with pytest.raises(SnapshotUnreadable):
        await store.patch_shared(scopes[0], {"a": 1}, T0)
    assert (await store.get_shared(scopes[2])).values == {"of": "None"}
