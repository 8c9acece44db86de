"""An erasure in SQLite leaves no byte: not in free pages, not between rows, not in the WAL."""

import asyncio
import random
from pathlib import Path

import apsw
import pytest

from app.domain.branch import ToTurn
from app.domain.errors import StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.session import SessionChange
from app.domain.state import StateScope
from app.ports import SessionStore
from app.stores.sqlite import file
from app.stores.sqlite.store import SqliteStore

from .builders import (
    BOOT,
    LIFE,
    T0,
    extend,
    make_checkpoint,
    make_session,
    make_turn,
    running,
    stored_session,
)

MARK = "Mary-Q-Contrary"


def found_in(folder: Path, text: str = MARK) -> dict[str, int]:
    """Return how often the text is in each of the store's files."""
    counts = {path.name: path.read_bytes().count(text.encode()) for path in folder.iterdir()}
    return {name: count for name, count in counts.items() if count}


async def live(store: SessionStore, name: str, user_id: str, dice: random.Random) -> None:
    """Do all that stores something of a user, in rows of every size, over and over."""
    mark = f"{user_id} " * 5
    session = await stored_session(store, name, user_id=user_id, title=mark, metadata={"who": mark})
    for number in range(12):
        said = mark * dice.choice((1, 3, 60, 900))
        turn = make_turn(session, said, said)
        await store.start_turn(session, running(turn))
        session = await store.commit_turn(session, turn)
        session = await store.patch_state(session.key, {"k": mark * dice.choice((1, 80, 400))}, T0 + number)
        await store.add_checkpoint(session, make_checkpoint(label=mark, data={"d": said}))
        change = SessionChange(metadata={"who": mark * number}, title=f"{mark}{number}")
        session = await store.update_session(session.key, change, T0 + number)
        await store.patch_shared(StateScope("default", "", user_id), {"n": mark * dice.choice((1, 300))}, T0)
    fork = make_session(f"{name}-fork", user_id=user_id, metadata={"who": mark})
    await store.fork_session(session, ToTurn(turn.turn_id), fork)
    await store.delete_checkpoints(session)


async def erase(store: SessionStore, user_id: str) -> None:
    while keys := await store.list_keys("", user_id=user_id, limit=50):
        await store.delete_sessions(keys)
    await store.forget_user("", user_id)


async def test_no_byte_of_an_erased_user_is_left(tmp_path: Path) -> None:
    """Rows grew, moved, were split over pages and deleted among others' rows: none of it can be found."""
    store, dice = SqliteStore(str(tmp_path / "agentpool.db"), LIFE), random.Random(7)
    await store.open(BOOT)
    await asyncio.gather(
        *(live(store, f"m{n}", MARK, dice) for n in range(4)),
        *(live(store, f"o{n}", "Somebody-Else", dice) for n in range(8)),
    )
    await store.delete_session(SessionKey("", "m0"))
    assert found_in(tmp_path)
    await erase(store, MARK)
    assert found_in(tmp_path) == {}
    assert found_in(tmp_path, "Somebody-Else")
    await store.close()
    assert found_in(tmp_path) == {}


async def test_an_erasure_waits_for_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a reader needs the old pages it does not say that they are gone; afterwards it does."""
    monkeypatch.setattr(file, "BUSY_TIMEOUT_MS", 1)
    path = tmp_path / "agentpool.db"
    store = SqliteStore(str(path), LIFE)
    await store.open(BOOT)
    session = await stored_session(store, "m", user_id=MARK)
    await extend(store, session, 2)
    reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    reader.execute("BEGIN; SELECT count(*) FROM sessions").fetchall()
    with pytest.raises(StoreUnavailable):
        await erase(store, MARK)
    assert found_in(tmp_path)
    await stored_session(store, "meanwhile")
    reader.close()
    await erase(store, MARK)
    assert found_in(tmp_path) == {}
    assert await store.list_keys(None, limit=9) == (SessionKey("", "meanwhile"),)
    await store.close()
