"""What every store promises about a session's state: it belongs to the branch."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from app.domain.branch import Back, ToCheckpoint, ToTurn
from app.domain.checkpoint import AutoCheckpoint
from app.domain.errors import InvalidInput, PreconditionFailed, SessionNotFound
from app.domain.free_object import OBJECT_MAX_BYTES, OBJECT_MAX_KEYS
from app.domain.ids import SessionKey
from app.domain.journal import LoggedFact, StateChanged
from app.domain.session import Session, SessionChange, SessionQuery
from app.ports import SessionStore

from .builders import (
    T0,
    current,
    extend,
    failed,
    make_checkpoint,
    make_session,
    make_turn,
    new_id,
    running,
    stored_session,
)
from .conftest import Place

LATER = T0 + 50_000
ODD: dict[str, Any] = {"": [None, {"x": None}], "🦊": {"a": 2**70, "b": 1.5, "c": "\u2028\x00"}, "t": True}
TOO_MUCH = [{"a": "x" * OBJECT_MAX_BYTES}, {f"k{number}": 1 for number in range(OBJECT_MAX_KEYS + 1)}]


async def patched(store: SessionStore, session: Session, **values: Any) -> Session:
    return await store.patch_state(session.key, values, LATER)


async def check_state(store: SessionStore, session: Session, state: dict[str, Any]) -> None:
    """Assert that ``session`` is what is stored, and has that state."""
    assert session.state == state
    assert await current(store, session) == session


async def one_turn(store: SessionStore, session: Session, **values: Any) -> tuple[Session, str]:
    """Patch the state, then commit a turn; return the session then and the turn's id."""
    session = await patched(store, session, **values)
    session = await store.commit_turn(session, make_turn(session))
    return session, session.head or ""


async def test_a_patch_merges(place: Place) -> None:
    """Null deletes, objects merge, the rest is replaced; both revisions grow, and it is found so."""
    store = place.store
    session = await stored_session(store, state={"a": 1, "b": {"c": 1, "d": 2}})
    after = await store.patch_state(session.key, {"a": None, "b": {"c": [3]}, "e": {"f": None}}, T0 + 5)
    assert after == replace(
        session, state={"b": {"c": [3], "d": 2}, "e": {}}, state_rev=1, rev=2, updated_at=T0 + 5
    )
    assert await current(await place.restart("boot-2"), session) == after


async def test_any_state_comes_back_exactly(place: Place) -> None:
    """Huge integers, floats, nulls in lists, odd keys: given at creation, patched, and stored with a turn."""
    store = place.store
    created = await stored_session(store, "created", state=ODD)
    session = await store.patch_state((await stored_session(store)).key, {"deep": ODD}, LATER)
    session, _ = await extend(store, session, 1)
    session, _ = await extend(store, await patched(store, session, deep=1), 1)
    store = await place.restart("boot-2")
    await check_state(store, created, ODD)
    await check_state(store, await store.move_head(session, Back(1), LATER), {"deep": {**ODD}})
    assert type((await current(store, session)).state["deep"]["🦊"]["a"]) is int


async def test_a_patch_is_no_activity(store: SessionStore) -> None:
    """The expiry clock and the idle mark stay; the update time never goes back."""
    session = await stored_session(store, marked_idle=True)
    after = await store.patch_state(session.key, {"a": 1}, LATER)
    assert (after.last_accessed, after.expires_at, after.marked_idle) == (T0, session.expires_at, True)
    again = await store.patch_state(session.key, {"a": 2}, T0)
    assert again.updated_at == after.updated_at == LATER


async def test_a_patch_is_logged(store: SessionStore) -> None:
    """Each with what was asked for, in order."""
    session = await stored_session(store, state={"a": 1})
    for number, patch in enumerate(({"a": 2}, {"b": ODD}, {"a": None})):
        await store.patch_state(session.key, patch, LATER + number)
    assert await store.list_entries(session, None, 9, newest_first=False) == (
        LoggedFact(1, LATER, StateChanged({"a": 2})),
        LoggedFact(2, LATER + 1, StateChanged({"b": ODD})),
        LoggedFact(3, LATER + 2, StateChanged({"a": None})),
    )


async def test_a_patch_honours_the_expected_revision(store: SessionStore) -> None:
    """With the revision that the state has it happens; with any other nothing changes or is logged."""
    session = await stored_session(store)
    first = await store.patch_state(session.key, {"a": 1}, LATER, expected_rev=session.state_rev)
    for rev in (session.state_rev, first.state_rev + 1):
        with pytest.raises(PreconditionFailed):
            await store.patch_state(session.key, {"a": 2}, LATER, expected_rev=rev)
    await check_state(store, first, {"a": 1})
    assert len(await store.list_entries(session, None, 9, newest_first=False)) == 1


async def test_the_state_has_its_own_revision(store: SessionStore) -> None:
    """A new title, a turn or activity leaves it; a changed state makes the record's grow, and the ETag."""
    session = await patched(store, await stored_session(store), a=1)
    changed = await store.update_session(session.key, SessionChange(title="t"), LATER)
    changed = await store.touch_session(session.key, LATER)
    changed = await store.commit_turn(changed, make_turn(changed))
    assert (changed.state_rev, changed.state) == (session.state_rev, {"a": 1})
    after = await patched(store, changed, a=2)
    assert (after.rev, after.state_rev) == (changed.rev + 1, session.state_rev + 1)
    assert after.etag != changed.etag


@pytest.mark.parametrize("patch", TOO_MUCH, ids=["bytes", "keys"])
async def test_a_state_has_limits(store: SessionStore, patch: dict[str, Any]) -> None:
    """A patch that makes it too large is InvalidInput, and neither changes nor logs anything."""
    session = await patched(store, await stored_session(store), a=1)
    with pytest.raises(InvalidInput):
        await store.patch_state(session.key, {"b": 2} | patch, LATER)
    await check_state(store, session, {"a": 1})
    assert len(await store.list_entries(session, None, 9, newest_first=False)) == 1


async def test_the_limit_is_that_of_the_result(store: SessionStore) -> None:
    """Two patches that are each small enough are refused where both together are not."""
    session = await patched(store, await stored_session(store), a="x" * (OBJECT_MAX_BYTES - 100))
    with pytest.raises(InvalidInput):
        await patched(store, session, b="x" * 200)
    await check_state(store, await patched(store, session, a=None, b="x" * 200), {"b": "x" * 200})


async def test_a_patch_never_makes_a_session(store: SessionStore) -> None:
    """A patch of a missing session raises and leaves nothing behind."""
    with pytest.raises(SessionNotFound):
        await store.patch_state(SessionKey("", "s1"), {"a": 1}, T0)
    assert store.session_count_nowait() == 0


async def test_a_listed_session_has_its_state(store: SessionStore) -> None:
    """As found alone, so listed."""
    session = await patched(store, await stored_session(store, user_id="u"), a=1)
    page = await store.list_sessions(SessionQuery(owner="", now=T0))
    assert page.sessions == await store.list_oldest("", "u", 9) == (session,)


async def test_a_move_brings_back_the_state(place: Place) -> None:
    """At each turn it is what it was at its commit, at the root the initial one; what came after is lost."""
    store = place.store
    session = await stored_session(store, state={"start": True})
    session, first = await one_turn(store, session, a=1)
    session, second = await one_turn(store, session, a=2, b=2)
    session, third = await one_turn(store, session)  # changes nothing
    session = await patched(store, session, a="after the last turn", start=None)
    states = {
        None: {"start": True},
        first: {"start": True, "a": 1},
        second: {"start": True, "a": 2, "b": 2},
        third: {"start": True, "a": 2, "b": 2},
    }
    for turn_id in (third, first, None, second, first, third, None, third):
        changed_from = session
        session = await store.move_head(session, ToTurn(turn_id), LATER)
        await check_state(store, session, states[turn_id])
        grew = session.state_rev > changed_from.state_rev
        assert grew or session.state == changed_from.state
    store = await place.restart("boot-2")
    for turn_id, state in states.items():
        assert (await store.at_turn(session, turn_id)).state == state
        session = await store.move_head(session, ToTurn(turn_id), LATER)
        await check_state(store, session, state)


async def test_back_and_forth_counts_turns_and_brings_back_states(store: SessionStore) -> None:
    """``Back`` brings back the state of the turn that it reaches; all the way, the initial one."""
    session = await stored_session(store, state={"n": 0})
    for number in range(1, 5):
        session, _ = await one_turn(store, session, n=number)
    session = await store.move_head(session, Back(3), LATER)
    await check_state(store, session, {"n": 1})
    session = await store.move_head(session, Back(1), LATER)
    await check_state(store, session, {"n": 0})


async def test_turns_without_patches_keep_the_state(place: Place) -> None:
    """Of forty turns with one patch in the middle, twenty have the one state and twenty the other."""
    store = place.store
    session, before = await extend(store, await stored_session(store, state={"a": 0}), 20)
    session, after = await extend(store, await patched(store, session, a=1), 20)
    await check_state(store, session, {"a": 1})
    store = await place.restart("boot-2")
    found = [(await store.at_turn(session, turn.turn_id)).state["a"] for turn in before + after]
    assert found == [0] * 20 + [1] * 20


async def test_a_patch_while_a_turn_runs_is_the_turns(store: SessionStore) -> None:
    """The commit keeps what was patched since the turn began, and stores it with the turn."""
    old, first = await one_turn(store, await stored_session(store), a=1)
    turn = make_turn(old)
    await store.start_turn(old, running(turn))
    await patched(store, old, a=2)
    session = await store.commit_turn(old, turn)
    await check_state(store, session, {"a": 2})
    session = await store.move_head(session, ToTurn(first), LATER)
    await check_state(store, session, {"a": 1})
    session = await store.move_head(session, ToTurn(turn.turn_id), LATER)
    await check_state(store, session, {"a": 2})


async def test_a_failed_turn_leaves_the_state(store: SessionStore) -> None:
    """A patch made while a turn ran stays when the turn fails."""
    session, _ = await one_turn(store, await stored_session(store), a=1)
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    await patched(store, session, a=2)
    await store.record_turn(session, failed(turn))
    assert (await current(store, session)).state == {"a": 2}


async def test_an_edit_brings_back_the_parents_state(store: SessionStore) -> None:
    """With ``resets_state`` it is that at the parent, also at the root and where the parent is the head."""
    session = await stored_session(store, state={"n": 0})
    session, first = await one_turn(store, session, n=1)
    session, _ = await one_turn(store, session, n=2)
    for parent, depth, n in ((first, 2, 1), (None, 1, 0)):
        session = await patched(store, session, n="changed")
        edit = make_turn(session, parent=parent, depth=depth)
        before = session
        session = await store.commit_turn(session, edit, resets_state=True)
        await check_state(store, session, {"n": n})
        assert session.state_rev > before.state_rev
        assert (await store.at_turn(session, edit.turn_id)).state == {"n": n}
    session = await patched(store, session, n="changed")
    session = await store.commit_turn(session, make_turn(session), resets_state=True)
    await check_state(store, session, {"n": 0})


async def test_a_regenerated_turn_keeps_the_state(store: SessionStore) -> None:
    """Without ``resets_state`` a commit from another parent leaves it as it is, and stores that."""
    session, first = await one_turn(store, await stored_session(store), n=1)
    session, second = await one_turn(store, session, n=2)
    again = make_turn(session, parent=first, depth=2)
    after = await store.commit_turn(session, again)
    assert (after.state, after.state_rev) == ({"n": 2}, session.state_rev)
    after = await patched(store, after, n=3)
    after = await store.move_head(after, ToTurn(again.turn_id), LATER)
    await check_state(store, after, {"n": 2})
    after = await store.move_head(after, ToTurn(first), LATER)
    await check_state(store, after, {"n": 1})
    assert (await store.at_turn(after, second)).state == {"n": 2}


async def test_a_restore_brings_back_the_checkpoints_state(place: Place) -> None:
    """As it was when the checkpoint was made, with patches after the turn; the turn's own is another."""
    store = place.store
    session, first = await one_turn(store, await stored_session(store, state={"n": 0}), n=1)
    session = await patched(store, session, n="between", odd=ODD)
    made = await store.add_checkpoint(session, make_checkpoint())
    session, _ = await one_turn(store, session, n=2, odd=None)
    store = await place.restart("boot-2")
    session = await store.move_head(session, ToCheckpoint(made.checkpoint_id), LATER)
    assert session.head == first
    await check_state(store, session, {"n": "between", "odd": ODD})
    session = await store.move_head(session, ToTurn(first), LATER)
    await check_state(store, session, {"n": 1})
    session = await store.move_head(session, ToCheckpoint(made.checkpoint_id), LATER)
    await check_state(store, session, {"n": "between", "odd": ODD})


async def test_an_automatic_checkpoint_has_the_state_of_its_commit(store: SessionStore) -> None:
    """Of an edit too: that which the edit brought back."""
    session, first = await one_turn(store, await stored_session(store), n=1)
    session, _ = await one_turn(store, session, n=2)
    wanted = AutoCheckpoint(new_id(), 9)
    edit = make_turn(session, parent=first, depth=2)
    session = await store.commit_turn(session, edit, resets_state=True, checkpoint=wanted)
    session, _ = await one_turn(store, session, n=3)
    session = await store.move_head(session, ToCheckpoint(wanted.checkpoint_id), LATER)
    assert session.head == edit.turn_id
    await check_state(store, session, {"n": 1})


async def test_a_checkpoint_of_the_root_has_its_state(store: SessionStore) -> None:
    """Made before the first turn but after a patch: restored with the patch, the root itself without."""
    session = await patched(store, await stored_session(store, state={"n": 0}), n="patched")
    made = await store.add_checkpoint(session, make_checkpoint())
    session, _ = await one_turn(store, session, n=1)
    session = await store.move_head(session, ToCheckpoint(made.checkpoint_id), LATER)
    assert session.head is None
    await check_state(store, session, {"n": "patched"})
    session = await store.move_head(session, ToTurn(None), LATER)
    await check_state(store, session, {"n": 0})


async def test_a_fork_has_the_state_of_its_place(place: Place) -> None:
    """That of the turn, of the checkpoint, or of the root, whatever the new record was made with."""
    store = place.store
    session, first = await one_turn(store, await stored_session(store, state={"n": 0}), n=1)
    session = await patched(store, session, n="named")
    made = await store.add_checkpoint(session, make_checkpoint())
    session, second = await one_turn(store, session, n=2)
    targets = (
        (ToTurn(first), {"n": 1}),
        (ToTurn(second), {"n": 2}),
        (Back(1), {"n": 1}),
        (ToCheckpoint(made.checkpoint_id), {"n": "named"}),
        (ToTurn(None), {"n": 0}),
        (None, {"n": 2}),
    )
    forks = []
    for number, (target, state) in enumerate(targets):
        new = make_session(f"fork-{number}", state={"other": 1})
        forks.append(await store.fork_session(session, target, new))
        await check_state(store, forks[-1], state)
    store = await place.restart("boot-2")
    for fork, (_, state) in zip(forks, targets, strict=True):
        await check_state(store, fork, state)


async def test_a_fork_goes_back_through_its_origins_states(place: Place) -> None:
    """Each turn of the path, and the root, has there what it had in the origin, which is gone by then."""
    store = place.store
    session, first = await one_turn(store, await stored_session(store, state={"n": 0}), n=1)
    session, second = await one_turn(store, session, n=2)
    fork = await store.fork_session(session, None, make_session("fork", state={"n": "new"}))
    await store.delete_session(session.key)
    fork, third = await one_turn(store, fork, n=3)
    store = await place.restart("boot-2")
    for turn_id, n in ((second, 2), (None, 0), (first, 1), (third, 3)):
        fork = await store.move_head(fork, ToTurn(turn_id), LATER)
        await check_state(store, fork, {"n": n})


async def test_the_states_of_a_fork_and_its_origin_are_two(store: SessionStore) -> None:
    """A patch of either is not seen in the other, now or when going back."""
    session, first = await one_turn(store, await stored_session(store), n=1)
    fork = await store.fork_session(session, None, make_session("fork"))
    session = await patched(store, session, mine=1)
    fork, _ = await one_turn(store, fork, theirs=2)
    await check_state(store, session, {"n": 1, "mine": 1})
    await check_state(store, fork, {"n": 1, "theirs": 2})
    for one in (session, fork):
        await check_state(store, await store.move_head(one, ToTurn(first), LATER), {"n": 1})


async def test_a_recreated_session_has_its_own_state(store: SessionStore) -> None:
    """Neither the old state nor the old initial one comes back under the same key."""
    old, _ = await one_turn(store, await stored_session(store, state={"n": 0}), n=1)
    await store.delete_session(old.key)
    new = await stored_session(store, state={"m": 0})
    await check_state(store, new, {"m": 0})
    new, _ = await one_turn(store, new, m=1)
    await check_state(store, await store.move_head(new, ToTurn(None), LATER), {"m": 0})


async def test_patches_of_different_keys_are_all_kept(store: SessionStore) -> None:
    """Fifty at once, each of its own key, without a revision: none is lost."""
    session = await stored_session(store)
    await asyncio.gather(*(store.patch_state(session.key, {f"k{n}": n}, LATER) for n in range(50)))
    after = await current(store, session)
    assert (after.state, after.state_rev) == ({f"k{n}": n for n in range(50)}, 50)


async def increment_own(store: SessionStore, session: Session, times: int) -> None:
    for _ in range(times):
        while True:
            found = await current(store, session)
            count = found.state.get("n", 0) + 1
            try:
                await store.patch_state(found.key, {"n": count}, LATER, expected_rev=found.state_rev)
                break
            except PreconditionFailed:
                continue


async def test_no_increment_of_a_sessions_state_is_lost(store: SessionStore) -> None:
    """Ten tasks that each add one ten times, while turns are committed, make a hundred."""
    session = await stored_session(store)
    await asyncio.gather(*(increment_own(store, session, 10) for _ in range(10)), extend(store, session, 20))
    after = await current(store, session)
    assert (after.state, after.state_rev, after.depth) == ({"n": 100}, 100, 20)
