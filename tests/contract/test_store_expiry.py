"""What every store promises about the end of sessions: they expire, and are purged whole."""

import pytest

from app.domain.errors import CheckpointNotFound, TurnNotFound
from app.domain.session import LifeSpan, SessionQuery
from app.domain.state import SharedState, StateScope
from app.domain.turn import Usage
from app.ports import SessionStore

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
from .conftest import Place


async def test_each_expiry_is_counted_once(store: SessionStore) -> None:
    """A sweep counts what has expired since the last one; archived sessions never do, revived ones again."""
    session = await stored_session(store, "a", ttl_s=10)
    await stored_session(store, "b", archived=True, expires_at=None)
    end = T0 + 10_000
    assert await store.expire_and_purge(end - 1, 10) == (0, 0)
    assert await store.expire_and_purge(end, 10) == (1, 0)
    assert await store.expire_and_purge(end + 1, 10) == (0, 0)
    await store.touch_session(session.key, end + 2)
    assert await store.expire_and_purge(end + 10_001, 10) == (0, 0)
    assert await store.expire_and_purge(end + 10_002, 10) == (1, 0)


async def test_what_expires_and_is_purged_in_one_sweep_is_counted_as_both(place: Place) -> None:
    """After a long standstill the first sweep counts each such session twice: expired, and removed."""
    for number in range(3):
        await stored_session(place.store, f"s{number}", ttl_s=10)
    now = T0 + 10_000 + LIFE.retention_s * 1000
    assert await (await place.restart("boot-2")).expire_and_purge(now, 10) == (3, 3)


async def test_purge_begins_exactly_when_retention_ends(store: SessionStore) -> None:
    """One millisecond before the end of its retention a session stays, at the end it goes."""
    session = make_session("a", ttl_s=10)
    await store.create_session(session)
    await store.commit_turn(session, make_turn(session, started_at=T0, finished_at=T0))
    due = T0 + 10_000 + LIFE.retention_s * 1000
    assert (await store.expire_and_purge(due - 1, 10))[1] == 0
    assert (await store.expire_and_purge(due, 10))[1] == 1
    assert await store.find_session(session.key) is None


async def test_purge_keeps_to_its_limit_oldest_first(store: SessionStore) -> None:
    """A purge removes as many as it may, those first that expired first."""
    for number in range(5):
        await store.create_session(make_session(f"s{number}", ttl_s=number + 1))
    now = T0 + 10_000_000
    assert (await store.expire_and_purge(now, 3))[1] == 3
    left = (await store.list_sessions(SessionQuery(owner="", now=now))).sessions
    assert {session.key.session_id for session in left} == {"s3", "s4"}


async def test_purge_never_takes_a_session_whose_turn_runs(place: Place) -> None:
    """A turn of this boot that runs keeps its session; that of a dead boot does not."""
    session = make_session("a", ttl_s=1)
    await place.store.create_session(session)
    turn = make_turn(session, started_at=T0)
    await place.store.start_turn(session, running(turn))
    now = T0 + 10_000_000
    assert (await place.store.expire_and_purge(now, 10))[1] == 0
    store = await place.restart("boot-2")
    assert (await store.expire_and_purge(now, 10))[1] == 1


@pytest.mark.parametrize("life", [LifeSpan(idle_after_s=0, ttl_s=1000, retention_s=0)])
async def test_without_retention_nothing_is_purged(place: Place, life: LifeSpan) -> None:
    """An expired session stays for ever."""
    session = await stored_session(place.store, ttl_s=1)
    assert await place.store.expire_and_purge(T0 * 3, 10) == (1, 0)
    assert await place.store.expire_and_purge(T0 * 4, 10) == (0, 0)
    assert await place.store.find_session(session.key) == session


async def test_a_purge_takes_what_is_the_sessions_and_nothing_else(place: Place) -> None:
    """Turns, facts, notes and checkpoints go with it; the user's usage and the shared state stay."""
    store, scope = place.store, StateScope("default", "", "u")
    session, turns = await extend(store, await stored_session(store, user_id="u"), 3)
    await store.patch_state(session.key, {"a": 1}, T0)
    await store.patch_shared(scope, {"b": 2}, T0)
    made = await store.add_checkpoint(session, make_checkpoint())
    session = await store.add_note(session, make_note(turns[0].turn_id), Usage(5, 5))
    usage = await store.get_usage("", "u", 9)
    assert await store.expire_and_purge(T0 * 2, 10) == (1, 1)
    store = await place.restart("boot-2")
    new = await stored_session(store, user_id="u")
    for gone in (session, new):
        assert (await store.list_turns(gone, 9)).turns == ()
        assert await store.list_entries(gone, None, 9, newest_first=False) == ()
        assert (await store.list_checkpoints(gone, 9)).total == 0
        assert await store.get_note(gone) is None
        with pytest.raises(TurnNotFound):
            await store.get_turn(gone, turns[0].turn_id)
        with pytest.raises(CheckpointNotFound):
            await store.get_checkpoint(gone, made.checkpoint_id)
    assert await store.get_usage("", "u", 9) == usage
    assert await store.get_shared(scope) == SharedState({"b": 2}, 1)
