"""What every store promises about the tree of turns: moving the head, going on from elsewhere, forks."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from app.domain.branch import Back, HeadTarget, ToTurn
from app.domain.errors import (
    HeadMoved,
    InvalidInput,
    SessionNotFound,
    TurnNotFound,
)
from app.domain.session import Session
from app.domain.turn import CancelReason, TurnStatus
from app.ports import SessionStore

from .builders import (
    LIFE,
    T0,
    current,
    dropped,
    extend,
    failed,
    make_session,
    make_turn,
    new_id,
    running,
    stored_session,
)
from .checks import check_branch, said
from .conftest import Place

LATER = T0 + 50_000


async def test_a_place_is_shown_and_nothing_is_written(store: SessionStore) -> None:
    """``at_turn`` gives head, depth and path of any committed turn and of the root; the record stays."""
    session = await stored_session(store, title="t", user_id="u")
    session, turns = await extend(store, session, 5)
    for depth in (5, 3, 1, 0):
        place = await store.at_turn(session, turns[depth - 1].turn_id if depth else None)
        assert (place.head, place.depth, place.note) == (
            turns[depth - 1].turn_id if depth else None,
            depth,
            None,
        )
        assert (await store.load_path(place)).messages == said(turns[:depth])
        assert (place.key, place.uid, place.title) == (session.key, session.uid, "t")
        assert await store.find_session(session.key) == session


Naming = Callable[[SessionStore, Session, str], Awaitable[object]]


async def _show(store: SessionStore, session: Session, turn_id: str) -> object:
    return await store.at_turn(session, turn_id)


async def _move(store: SessionStore, session: Session, turn_id: str) -> object:
    return await store.move_head(session, ToTurn(turn_id), LATER)


async def _fork(store: SessionStore, session: Session, turn_id: str) -> object:
    return await store.fork_session(session, ToTurn(turn_id), make_session("fork"))


@pytest.mark.parametrize("name", [_show, _move, _fork])
async def test_only_committed_turns_of_the_session_can_be_named(store: SessionStore, name: Naming) -> None:
    """A failed, dropped, running, foreign, unknown or malformed turn is TurnNotFound; nothing changes."""
    session, other = await stored_session(store), await stored_session(store, "s2")
    session, _ = await extend(store, session, 2)
    _, (foreign,) = await extend(store, other, 1)
    bad, lost, busy = make_turn(session), make_turn(session), make_turn(session)
    await store.record_turn(session, failed(bad))
    await store.record_turn(session, dropped(lost))
    await store.start_turn(session, running(busy))
    await store.ping()
    before = await current(store, session)
    ids = [turn.turn_id for turn in (bad, lost, busy, foreign)]
    for turn_id in (*ids, new_id(), "no id", "", "🙂" * 36):
        with pytest.raises(TurnNotFound):
            await name(store, session, turn_id)
    assert await current(store, session) == before
    assert store.session_count_nowait() == 2
    assert len(await store.list_entries(session, None, 99, newest_first=False)) == 5


async def test_a_kept_turn_can_be_named(store: SessionStore) -> None:
    """A cancelled turn whose partial answer was kept is a place like any other."""
    session, (first,) = await extend(store, await stored_session(store), 1)
    kept = make_turn(session, status=TurnStatus.CANCELLED, kept=True, cancel_reason=CancelReason.USER)
    session = await store.commit_turn(session, kept)
    session, _ = await extend(store, session, 1)
    session = await store.move_head(session, ToTurn(kept.turn_id), LATER)
    await check_branch(store, session, [first, kept])


async def test_the_head_goes_back_and_forth(place: Place) -> None:
    """To an earlier turn, the root, a later one: each time the branch is the path to it; all turns stay."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 6)
    for depth in (2, 6, 0, 5, 5, 1):
        target = ToTurn(turns[depth - 1].turn_id if depth else None)
        session = await store.move_head(session, target, LATER)
        await check_branch(store, session, turns[:depth])
        assert (await store.list_turns(session, 1)).total == 6
    await check_branch(await place.restart("boot-2"), session, turns[:1])


async def test_a_move_is_activity(store: SessionStore) -> None:
    """It restarts the expiry clock, also of an expired session, takes the idle mark, and is an update."""
    session = await stored_session(store, marked_idle=True)
    session, turns = await extend(store, session, 2)
    late = T0 + LIFE.ttl_s * 2000
    moved = await store.move_head(session, Back(1), late)
    assert moved == replace(session.touched(late, LIFE), head=turns[0].turn_id, depth=1, updated_at=late)
    assert await current(store, session) == moved


@pytest.mark.parametrize("turns_back", [1, 3, 4, 5])
async def test_back_counts_turns_of_the_branch(store: SessionStore, turns_back: int) -> None:
    """So many turns up from the head, a branch of five; as many as there are is the root."""
    session, turns = await extend(store, await stored_session(store), 5)
    session = await store.move_head(session, Back(turns_back), LATER)
    await check_branch(store, session, turns[: 5 - turns_back])


async def test_back_is_never_beyond_the_root(store: SessionStore) -> None:
    """One turn more than there are, on this branch, is InvalidInput and changes nothing."""
    session, _ = await extend(store, await stored_session(store), 3)
    session = await store.move_head(session, Back(1), LATER)
    for turns_back in (3, 1000):
        with pytest.raises(InvalidInput):
            await store.move_head(session, Back(turns_back), LATER + 1)
    assert await current(store, session) == session
    root = await store.move_head(session, Back(2), LATER)
    with pytest.raises(InvalidInput):
        await store.move_head(root, Back(1), LATER + 1)


async def test_back_follows_the_branch_not_the_order_of_turns(store: SessionStore) -> None:
    """On an edited branch the turn before the edit is its parent, not the turn that was there before."""
    session, turns = await extend(store, await stored_session(store), 3)
    edit = make_turn(session, parent=turns[0].turn_id, depth=2)
    session = await store.commit_turn(session, edit, resets_state=True)
    session = await store.move_head(session, Back(1), LATER)
    await check_branch(store, session, turns[:1])


async def test_the_head_moves_to_a_sibling(store: SessionStore) -> None:
    """From one of two branches to a turn in the middle of the other, and on from there."""
    session, turns = await extend(store, await stored_session(store), 3)
    session = await store.move_head(session, ToTurn(turns[0].turn_id), LATER)
    session, others = await extend(store, session, 2)
    session = await store.move_head(session, ToTurn(turns[1].turn_id), LATER)
    await check_branch(store, session, turns[:2])
    session, more = await extend(store, session, 1)
    await check_branch(store, session, [*turns[:2], *more])
    session = await store.move_head(session, ToTurn(others[1].turn_id), LATER)
    await check_branch(store, session, [turns[0], *others])


async def test_a_move_from_an_old_head_is_refused(store: SessionStore) -> None:
    """Who has not seen the last commit, or the last move, cannot move: HeadMoved, and nothing changes."""
    old, turns = await extend(store, await stored_session(store), 2)
    session, _ = await extend(store, old, 1)
    targets: list[HeadTarget] = [ToTurn(turns[0].turn_id), Back(1), ToTurn(old.head)]
    for target in targets:
        with pytest.raises(HeadMoved):
            await store.move_head(old, target, LATER)
    assert await current(store, session) == session
    moved = await store.move_head(session, Back(3), LATER)
    with pytest.raises(HeadMoved):
        await store.move_head(session, Back(1), LATER)
    assert await current(store, session) == moved


async def test_one_of_many_racing_moves_and_commits_wins(store: SessionStore) -> None:
    """Five moves and five commits from one head at once: one happens, nine raise HeadMoved."""
    session, turns = await extend(store, await stored_session(store), 3)
    commits = [store.commit_turn(session, make_turn(session)) for _ in range(5)]
    moves = [store.move_head(session, ToTurn(turns[0].turn_id), LATER) for _ in range(5)]
    pairs = [call for pair in zip(moves, commits, strict=True) for call in pair]
    results = await asyncio.gather(*pairs, return_exceptions=True)
    won = [result for result in results if isinstance(result, Session)]
    assert len(won) == 1
    assert sum(isinstance(result, HeadMoved) for result in results) == 9
    assert await current(store, session) == won[0]


async def test_an_old_incarnation_has_no_branch(store: SessionStore) -> None:
    """After a delete, also when the key is in use again, moves and forks of the old one are refused."""
    old, _ = await extend(store, await stored_session(store), 2)
    await store.delete_session(old.key)
    for _ in range(2):
        with pytest.raises(SessionNotFound):
            await store.move_head(old, Back(1), LATER)
        with pytest.raises(SessionNotFound):
            await store.fork_session(old, None, make_session("fork"))
        with pytest.raises(TurnNotFound):
            await store.at_turn(old, old.head)
        if await store.find_session(old.key) is None:
            new = await stored_session(store)
    assert await current(store, new) == new
    assert store.session_count_nowait() == 1


async def test_an_edit_begins_a_branch(place: Place) -> None:
    """A commit with an earlier parent: the head is the new turn, its depth its parent's plus one."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 4)
    edit = make_turn(session, "edited", parent=turns[1].turn_id, depth=3, started_at=LATER)
    after = await store.commit_turn(session, edit, resets_state=True)
    await check_branch(store, after, [*turns[:2], edit])
    assert after.last_accessed == edit.finished_at
    assert (await store.get_turn(after, edit.turn_id)).parent == turns[1].turn_id
    siblings = {t.turn_id for t in (await store.list_turns(after, 9)).turns if t.parent == turns[1].turn_id}
    assert siblings == {turns[2].turn_id, edit.turn_id}
    after, more = await extend(store, after, 2)
    await check_branch(await place.restart("boot-2"), after, [*turns[:2], edit, *more])


async def test_an_edit_of_the_first_turn_begins_at_the_root(store: SessionStore) -> None:
    """With no parent the new turn is a first one; the other tree stays, and can be gone back to."""
    session, turns = await extend(store, await stored_session(store), 3)
    edit = make_turn(session, "edited", parent=None, depth=1)
    session = await store.commit_turn(session, edit, resets_state=True)
    await check_branch(store, session, [edit])
    session = await store.move_head(session, ToTurn(turns[2].turn_id), LATER)
    await check_branch(store, session, turns)


async def test_a_regenerated_turn_is_a_sibling_of_the_head(store: SessionStore) -> None:
    """Same parent, same depth, and only one of the two on the branch; also of a first turn."""
    session, (first,) = await extend(store, await stored_session(store), 1)
    again = make_turn(session, first.input, "another answer", parent=None, depth=1)
    session = await store.commit_turn(session, again)
    await check_branch(store, session, [again])
    session, (second,) = await extend(store, session, 1)
    for number in range(3):
        third = make_turn(session, second.input, f"answer {number}", parent=again.turn_id, depth=2)
        session = await store.commit_turn(session, third)
        await check_branch(store, session, [again, third])
    assert (await store.list_turns(session, 1)).total == 6


async def test_an_edit_sees_the_branch_that_a_child_of_another_branch_has(store: SessionStore) -> None:
    """The parent may lie on a branch that is not the current one."""
    session, turns = await extend(store, await stored_session(store), 3)
    session = await store.move_head(session, Back(3), LATER)
    session, _ = await extend(store, session, 1)
    edit = make_turn(session, parent=turns[2].turn_id, depth=4)
    session = await store.commit_turn(session, edit, resets_state=True)
    await check_branch(store, session, [*turns, edit])


async def test_an_edit_compares_the_head_it_was_begun_at(store: SessionStore) -> None:
    """When the head has moved since, an edit is refused although its parent is there, and leaves nothing."""
    old, turns = await extend(store, await stored_session(store), 2)
    session, _ = await extend(store, old, 1)
    edit = make_turn(old, parent=turns[0].turn_id, depth=2)
    with pytest.raises(HeadMoved):
        await store.commit_turn(old, edit, resets_state=True)
    assert await current(store, session) == session
    with pytest.raises(TurnNotFound):
        await store.get_turn(session, edit.turn_id)


async def test_the_depth_follows_from_the_parent(store: SessionStore) -> None:
    """An edit that has the depth of a turn behind the head is a ValueError and is not stored."""
    session, turns = await extend(store, await stored_session(store), 3)
    edit = make_turn(session, parent=turns[0].turn_id)
    with pytest.raises(ValueError):
        await store.commit_turn(session, edit)
    assert await current(store, session) == session


async def test_repeating_an_edit_changes_nothing(store: SessionStore) -> None:
    """The same commit once more, also from the new head, returns what the first returned."""
    session, turns = await extend(store, await stored_session(store), 3)
    edit = make_turn(session, parent=turns[0].turn_id, depth=2)
    after = await store.commit_turn(session, edit, resets_state=True)
    assert await store.commit_turn(session, edit, resets_state=True) == after
    assert await store.commit_turn(after, edit, resets_state=True) == after
    assert (await store.list_turns(after, 9)).total == 4


async def test_only_turns_of_the_branch_page_it(store: SessionStore) -> None:
    """History before a turn of another branch is TurnNotFound until the head is on that branch again."""
    session, turns = await extend(store, await stored_session(store), 4)
    moved = await store.move_head(session, Back(2), LATER)
    with pytest.raises(TurnNotFound):
        await store.list_branch(moved, 9, turns[3].turn_id)
    assert [t.turn_id for t in await store.list_branch(moved, 9, turns[1].turn_id)] == [turns[0].turn_id]
    session = await store.move_head(moved, ToTurn(turns[3].turn_id), LATER)
    assert len(await store.list_branch(session, 9, turns[3].turn_id)) == 3
