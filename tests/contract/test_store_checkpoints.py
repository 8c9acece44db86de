"""What every store promises about checkpoints: names for a turn and a state, which can be gone back to."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from app.domain.branch import Back, ToCheckpoint, ToTurn
from app.domain.checkpoint import NAMED_MAX, AutoCheckpoint, Checkpoint
from app.domain.errors import CheckpointNotFound, HeadMoved, InvalidInput, SessionNotFound, TurnNotFound
from app.domain.session import Session
from app.ports import SessionStore

from .builders import (
    T0,
    current,
    extend,
    make_checkpoint,
    make_session,
    make_turn,
    new_id,
    stored_session,
)
from .checks import check_branch
from .conftest import Place

LATER = T0 + 50_000
DATA: dict[str, Any] = {"step": 3, "nested": {"🦊": [1.5, None, 2**70, "\u2028"]}, "": False}


async def listed(store: SessionStore, session: Session) -> list[str]:
    page = await store.list_checkpoints(session, 200)
    assert page.total == len(page.checkpoints)
    return [checkpoint.checkpoint_id for checkpoint in page.checkpoints]


async def auto_commit(store: SessionStore, session: Session, keep: int) -> tuple[Session, str]:
    """Commit a turn with an automatic checkpoint; return the session then and the checkpoint's id."""
    wanted = AutoCheckpoint(new_id(), keep)
    session = await store.commit_turn(session, make_turn(session), checkpoint=wanted)
    return session, wanted.checkpoint_id


async def test_a_checkpoint_names_the_head(place: Place) -> None:
    """It comes back with the head's id, and is found so, label, data and all, also after a restart."""
    session, turns = await extend(place.store, await stored_session(place.store), 3)
    given = make_checkpoint(label="до начала 🏁", data=DATA, created_at=LATER)
    made = await place.store.add_checkpoint(session, given)
    assert made == replace(given, turn_id=turns[2].turn_id)
    for life in (1, 2):
        store = place.store if life == 1 else await place.restart("boot-2")
        assert await store.get_checkpoint(session, given.checkpoint_id) == made
        assert (await store.list_checkpoints(session, 9)).checkpoints == (made,)


async def test_a_checkpoint_may_name_the_root(store: SessionStore) -> None:
    """Before the first turn there is no turn to name; going back to it is going back to the root."""
    session = await stored_session(store)
    made = await store.add_checkpoint(session, make_checkpoint())
    assert (made.turn_id, made.label, made.data, made.automatic) == (None, None, {}, False)
    session, _ = await extend(store, session, 2)
    session = await store.move_head(session, ToCheckpoint(made.checkpoint_id), LATER)
    await check_branch(store, session, [])


async def test_the_head_is_that_of_the_moment(store: SessionStore) -> None:
    """Who has not seen the last commit names it all the same: the head as it is, not as it was read."""
    old, _ = await extend(store, await stored_session(store), 1)
    _, (last,) = await extend(store, old, 1)
    assert (await store.add_checkpoint(old, make_checkpoint())).turn_id == last.turn_id


async def test_making_and_deleting_one_is_no_activity(store: SessionStore) -> None:
    """The record, its revision and its times stay as they are."""
    session, _ = await extend(store, await stored_session(store), 1)
    made = await store.add_checkpoint(session, make_checkpoint(created_at=LATER))
    assert await current(store, session) == session
    await store.delete_checkpoints(session, made.checkpoint_id)
    assert await current(store, session) == session


async def test_making_one_again_is_harmless(store: SessionStore) -> None:
    """The same checkpoint once more, after the session went on, is the one from before."""
    session, _ = await extend(store, await stored_session(store), 1)
    given = make_checkpoint(label="x")
    made = await store.add_checkpoint(session, given)
    session, _ = await extend(store, session, 1)
    assert await store.add_checkpoint(session, given) == made
    assert await listed(store, session) == [given.checkpoint_id]


async def test_a_restore_brings_back_the_turn(place: Place) -> None:
    """From later on the branch, from the root and from another branch the path is that of the checkpoint."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 3)
    made = await store.add_checkpoint(session, make_checkpoint())
    target = ToCheckpoint(made.checkpoint_id)
    session, _ = await extend(store, session, 2)
    session = await store.move_head(session, target, LATER)
    await check_branch(store, session, turns)
    session = await store.move_head(session, ToTurn(None), LATER)
    session = await store.move_head(session, target, LATER)
    await check_branch(store, session, turns)
    edit = make_turn(session, parent=turns[0].turn_id, depth=2)
    session = await store.commit_turn(session, edit, resets_state=True)
    session = await store.move_head(session, target, LATER)
    await check_branch(await place.restart("boot-2"), session, turns)


async def test_a_restore_from_an_old_head_is_refused(store: SessionStore) -> None:
    """A restore is a move like any other: HeadMoved when the head is not the one that was read."""
    session, _ = await extend(store, await stored_session(store), 1)
    made = await store.add_checkpoint(session, make_checkpoint())
    after, _ = await extend(store, session, 1)
    with pytest.raises(HeadMoved):
        await store.move_head(session, ToCheckpoint(made.checkpoint_id), LATER)
    assert await current(store, session) == after


async def test_checkpoints_are_listed_newest_first(store: SessionStore) -> None:
    """Pages of 7 over 50, many of the same millisecond, give each once, the newest first."""
    session = await stored_session(store)
    made = [
        await store.add_checkpoint(session, make_checkpoint(created_at=T0 + number // 4))
        for number in range(50)
    ]
    found: list[Checkpoint] = []
    cursor = None
    while True:
        page = await store.list_checkpoints(session, 7, cursor)
        assert page.total == 50
        found += page.checkpoints
        cursor = page.next_cursor
        if cursor is None:
            break
    assert found == made[::-1]
    assert (await store.list_checkpoints(session, 50)).next_cursor is None
    assert (await store.list_checkpoints(session, 1)).checkpoints == (made[-1],)


@pytest.mark.parametrize("cursor", ["", "x", "czEuMQ", "dDEuMQ", "dDEuYWJj🙂", "Y3guMQ"])
async def test_a_foreign_checkpoint_cursor_is_refused(store: SessionStore, cursor: str) -> None:
    """A cursor that no listing of checkpoints gave, one of turns too, raises InvalidInput."""
    session = await stored_session(store)
    with pytest.raises(InvalidInput) as caught:
        await store.list_checkpoints(session, 10, cursor)
    assert caught.value.field == "cursor"


async def test_one_or_all_are_deleted(place: Place) -> None:
    """The answer says how many there were; turns and head stay, and the others."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 2)
    made = [await store.add_checkpoint(session, make_checkpoint()) for _ in range(4)]
    ids = [checkpoint.checkpoint_id for checkpoint in made]
    assert await store.delete_checkpoints(session, ids[1]) == 1
    assert await store.delete_checkpoints(session, ids[1]) == 0
    assert sorted(await listed(store, session)) == sorted([ids[0], ids[2], ids[3]])
    for call in (
        lambda: store.get_checkpoint(session, ids[1]),
        lambda: store.move_head(session, ToCheckpoint(ids[1]), LATER),
    ):
        with pytest.raises(CheckpointNotFound):
            await call()
    assert await store.delete_checkpoints(session) == 3
    assert await store.delete_checkpoints(session) == 0
    store = await place.restart("boot-2")
    assert await listed(store, session) == []
    await check_branch(store, session, turns)


async def test_a_checkpoint_is_found_only_in_its_session(store: SessionStore) -> None:
    """Another session's, an unknown and a malformed id are CheckpointNotFound; none is deleted so."""
    session, other = await stored_session(store), await stored_session(store, "s2")
    foreign = await store.add_checkpoint(other, make_checkpoint())
    for checkpoint_id in (foreign.checkpoint_id, new_id(), "no id", "", "🙂" * 36):
        with pytest.raises(CheckpointNotFound):
            await store.get_checkpoint(session, checkpoint_id)
        with pytest.raises(CheckpointNotFound):
            await store.move_head(session, ToCheckpoint(checkpoint_id), LATER)
        with pytest.raises(CheckpointNotFound):
            await store.fork_session(session, ToCheckpoint(checkpoint_id), make_session("fork"))
        assert await store.delete_checkpoints(session, checkpoint_id) == 0
    assert await listed(store, session) == []
    assert await listed(store, other) == [foreign.checkpoint_id]
    assert store.session_count_nowait() == 2


async def test_checkpoints_go_with_their_session(store: SessionStore) -> None:
    """After a delete, and when the key is in use again, the old ones are neither there nor reachable."""
    old, _ = await extend(store, await stored_session(store), 1)
    made = await store.add_checkpoint(old, make_checkpoint())
    await store.delete_session(old.key)
    new = await stored_session(store)
    for session in (old, new):
        with pytest.raises(CheckpointNotFound):
            await store.get_checkpoint(session, made.checkpoint_id)
        assert await listed(store, session) == []
        assert await store.delete_checkpoints(session) == 0
    with pytest.raises(SessionNotFound):
        await store.add_checkpoint(old, make_checkpoint())
    assert await listed(store, new) == []


async def test_a_session_has_so_many_named_ones(store: SessionStore) -> None:
    """The 1,000th is made and the next refused, whatever automatic ones there are; one gone, one more."""
    session, _ = await auto_commit(store, await stored_session(store), 5)
    made: list[Checkpoint] = []
    for _ in range(NAMED_MAX // 50):  # not all at once: a store may refuse what waits too long
        made += await asyncio.gather(*(store.add_checkpoint(session, make_checkpoint()) for _ in range(50)))
    with pytest.raises(InvalidInput):
        await store.add_checkpoint(session, make_checkpoint())
    assert (await store.list_checkpoints(session, 1)).total == NAMED_MAX + 1
    assert await store.add_checkpoint(session, replace(made[0], turn_id=None)) == made[0]
    session, _ = await auto_commit(store, session, 5)
    await store.delete_checkpoints(session, made[0].checkpoint_id)
    await store.add_checkpoint(session, make_checkpoint())
    with pytest.raises(InvalidInput):
        await store.add_checkpoint(session, make_checkpoint())


async def test_an_automatic_checkpoint_is_made_with_its_commit(place: Place) -> None:
    """It names the turn that was committed, at the time at which that ended, and can be restored."""
    session = await stored_session(place.store)
    turn = make_turn(session)
    wanted = AutoCheckpoint(new_id(), 3)
    session = await place.store.commit_turn(session, turn, checkpoint=wanted)
    store = await place.restart("boot-2")
    assert await store.get_checkpoint(session, wanted.checkpoint_id) == Checkpoint(
        checkpoint_id=wanted.checkpoint_id,
        turn_id=turn.turn_id,
        created_at=turn.finished_at or 0,
        automatic=True,
    )
    session, _ = await extend(store, session, 1)
    session = await store.move_head(session, ToCheckpoint(wanted.checkpoint_id), LATER)
    await check_branch(store, session, [turn])


async def test_only_the_newest_automatic_ones_stay(store: SessionStore) -> None:
    """With each commit the oldest beyond ``keep`` goes, at once when that is lower; named ones stay."""
    session = await stored_session(store)
    named, automatic = [], []
    for number in range(6):
        session, made = await auto_commit(store, session, 3)
        automatic.append(made)
        if number % 2:
            checkpoint = make_checkpoint(created_at=session.last_accessed)
            named.append((await store.add_checkpoint(session, checkpoint)).checkpoint_id)
        assert set(await listed(store, session)) == {*automatic[-3:], *named}
    session, last = await auto_commit(store, session, 1)
    assert set(await listed(store, session)) == {last, *named}
    with pytest.raises(CheckpointNotFound):
        await store.get_checkpoint(session, automatic[-1])


async def test_a_commit_without_wish_makes_none(store: SessionStore) -> None:
    """And one that is refused, or repeated, makes none either."""
    session, _ = await extend(store, await stored_session(store), 1)
    assert await listed(store, session) == []
    turn, wanted = make_turn(session), AutoCheckpoint(new_id(), 9)
    after = await store.commit_turn(session, turn, checkpoint=wanted)
    for again in (wanted, AutoCheckpoint(new_id(), 9)):
        assert await store.commit_turn(session, turn, checkpoint=again) == after
    with pytest.raises(HeadMoved):
        await store.commit_turn(session, make_turn(session), checkpoint=AutoCheckpoint(new_id(), 9))
    assert await listed(store, after) == [wanted.checkpoint_id]


async def test_a_checkpoint_outlives_that_its_branch_is_left(store: SessionStore) -> None:
    """It names its turn when the head is elsewhere, and a fork from it has just that path."""
    session, turns = await extend(store, await stored_session(store), 3)
    made = await store.add_checkpoint(session, make_checkpoint())
    session = await store.move_head(session, Back(2), LATER)
    session, _ = await extend(store, session, 4)
    assert (await store.get_checkpoint(session, made.checkpoint_id)).turn_id == turns[2].turn_id
    fork = await store.fork_session(session, ToCheckpoint(made.checkpoint_id), make_session("fork"))
    await check_branch(store, fork, turns)
    with pytest.raises(TurnNotFound):
        await store.get_turn(fork, session.head or "")
