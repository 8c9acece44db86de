"""What an erasure in SQLite leaves in the files: no row, nothing in the WAL; in a rebuilt file no byte."""

import asyncio
import random
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from app.domain.branch import ToTurn
from app.domain.errors import StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.session import SessionChange
from app.domain.state import StateScope
from app.ports import SessionStore
from app.stores.sqlite import file, users
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


def back_up(path: Path, folder: Path) -> Path:
    """Have the database copied into the folder as its rows are, without the free space between them."""
    with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
        connection.execute("VACUUM INTO ?", (str(folder / "backup.db"),))
    return folder


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


@pytest.mark.parametrize("seed", range(3))
async def test_what_is_left_of_an_erased_user(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """No row and nothing in the WAL; a backup and a rebuilt file have no copies from split pages, either."""
    path = tmp_path / "agentpool.db"
    store, dice = SqliteStore(str(path), LIFE), random.Random(seed)
    await store.open(BOOT)
    await asyncio.gather(
        *(live(store, f"m{n}", MARK, dice) for n in range(4)),
        *(live(store, f"o{n}", "Somebody-Else", dice) for n in range(8)),
    )
    await store.delete_session(SessionKey("", "m0"))
    assert found_in(tmp_path)
    await erase(store, MARK)
    assert path.with_name("agentpool.db-wal").stat().st_size == 0
    copies = back_up(path, tmp_path_factory.mktemp("copies"))
    assert found_in(copies) == {}
    assert found_in(copies, "Somebody-Else")
    await store.scrub()
    await store.close()
    assert found_in(tmp_path) == {}
    assert found_in(tmp_path, "Somebody-Else")


async def test_an_erasure_waits_for_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a reader needs the old pages it does not say that they are gone; afterwards it does."""
    monkeypatch.setattr(users, "CUT_WAIT_S", 0)
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
    assert path.with_name("agentpool.db-wal").stat().st_size == 0
    assert await store.list_keys(None, limit=9) == (SessionKey("", "meanwhile"),)
    await store.close()


async def test_a_reader_holds_up_nobody_but_who_erases(tmp_path: Path) -> None:
    """While erasures wait for a backup others write as ever, and when it ends all of them are done."""
    path = tmp_path / "agentpool.db"
    store = SqliteStore(str(path), LIFE)
    await store.open(BOOT)
    sessions = [await stored_session(store, f"m{n}", user_id=f"{MARK}{n}") for n in range(8)]
    for session in sessions:
        await extend(store, session, 1)
    reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    reader.execute("BEGIN; SELECT count(*) FROM sessions").fetchall()
    erasures = [asyncio.ensure_future(erase(store, f"{MARK}{n}")) for n in range(8)]
    while await store.list_keys("", limit=9):  # noqa: ASYNC110
        await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    slowest = 0.0
    for number in range(20):
        began = loop.time()
        await stored_session(store, f"other{number}", user_id="o")
        slowest = max(slowest, loop.time() - began)
    assert not any(erasure.done() for erasure in erasures)
    assert slowest < file.BUSY_TIMEOUT_MS / 1000
    reader.close()
    await asyncio.gather(*erasures)
    assert path.with_name("agentpool.db-wal").stat().st_size == 0
    await store.close()


async def test_erasing_nobody_does_not_cut_the_wal(tmp_path: Path) -> None:
    """Where nothing was deleted since the last time it is let be; a session that was deleted is owed."""
    path = tmp_path / "agentpool.db"
    store = SqliteStore(str(path), LIFE)
    await store.open(BOOT)
    await erase(store, "nobody")
    session = await stored_session(store, "m", user_id=MARK)
    wal = path.with_name("agentpool.db-wal")
    assert wal.stat().st_size
    await erase(store, "nobody")
    assert wal.stat().st_size
    await store.delete_session(session.key)
    await erase(store, "nobody")
    assert wal.stat().st_size == 0
    await store.close()
