"""What every store promises about forks: whole from the first moment, and on their own ever after."""

import asyncio

import pytest

from app.domain.branch import Back, HeadTarget, ToCheckpoint, ToTurn
from app.domain.errors import (
    CheckpointNotFound,
    InvalidInput,
    SessionExists,
    SessionLimit,
    TurnNotFound,
)
from app.domain.idempotency import Binding, fingerprint
from app.domain.ids import SessionKey
from app.domain.session import SessionCap
from app.domain.turn import Turn
from app.ports import SessionStore

from .builders import (
    T0,
    current,
    extend,
    failed,
    make_checkpoint,
    make_session,
    make_turn,
    running,
    stored_session,
)
from .checks import check_branch, said
from .conftest import Place

LATER = T0 + 50_000


@pytest.mark.parametrize(
    ("back", "left"), [(None, 4), (0, 4), (1, 3), (3, 1), (4, 0)], ids=["head", "head-id", "3", "1", "root"]
)
@pytest.mark.parametrize("by", ["turn", "back", "checkpoint"])
async def test_a_fork_goes_on_from_the_target(place: Place, by: str, back: int | None, left: int) -> None:
    """Its branch is the path to the target with the origin's turn ids; it is stored, and a session."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 4)
    target: HeadTarget | None = None
    if back is not None:
        place_id = turns[left - 1].turn_id if left else None
        target = Back(back) if by == "back" else ToTurn(place_id)
        if by == "checkpoint":
            moved = await store.move_head(session, ToTurn(place_id), LATER)
            checkpoint = await store.add_checkpoint(moved, make_checkpoint())
            session = await store.move_head(moved, ToTurn(turns[-1].turn_id), LATER)
            target = ToCheckpoint(checkpoint.checkpoint_id)
    new = make_session("fork", now=LATER, user_id="u", title="copy")
    fork = await store.fork_session(session, target, new)
    assert (fork.key, fork.uid, fork.title, fork.last_accessed) == (new.key, new.uid, "copy", LATER)
    await check_branch(store, fork, turns[:left])
    assert await current(store, session) == session
    await check_branch(await place.restart("boot-2"), fork, turns[:left])


async def test_a_fork_and_its_origin_never_touch(place: Place) -> None:
    """Turns, moves and edits in either are not seen in the other, though both have the same turn ids."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 3)
    fork = await store.fork_session(session, None, make_session("fork"))
    session, mine = await extend(store, session, 2)
    fork, theirs = await extend(store, fork, 1)
    edit = make_turn(fork, parent=turns[0].turn_id, depth=2)
    fork = await store.commit_turn(fork, edit, resets_state=True)
    await check_branch(store, session, [*turns, *mine])
    await check_branch(store, fork, [turns[0], edit])
    for own, foreign in ((session, theirs[0]), (session, edit), (fork, mine[0])):
        with pytest.raises(TurnNotFound):
            await store.get_turn(own, foreign.turn_id)
    fork = await store.move_head(fork, ToTurn(theirs[0].turn_id), LATER)
    store = await place.restart("boot-2")
    await check_branch(store, session, [*turns, *mine])
    await check_branch(store, fork, [*turns, *theirs])


@pytest.mark.parametrize("goes", ["origin", "fork"])
async def test_either_of_a_fork_and_its_origin_outlives_the_other(place: Place, goes: str) -> None:
    """When one is deleted the other keeps its whole path, can be moved and goes on."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 4)
    fork = await store.fork_session(session, Back(1), make_session("fork"))
    gone, left = (session, fork) if goes == "origin" else (fork, session)
    path = turns[: left.depth]
    await store.delete_session(gone.key)
    store = await place.restart("boot-2")
    await check_branch(store, left, path)
    left = await store.move_head(left, ToTurn(turns[1].turn_id), LATER)
    left, more = await extend(store, left, 1)
    await check_branch(store, left, [*turns[:2], *more])


async def test_only_the_path_is_copied(store: SessionStore) -> None:
    """Siblings, failed and running turns, checkpoints and what was logged stay with the origin."""
    session, turns = await extend(store, await stored_session(store), 3)
    session = await store.move_head(session, Back(1), LATER)
    session, (last,) = await extend(store, session, 1)
    await store.record_turn(session, failed(make_turn(session)))
    await store.add_checkpoint(session, make_checkpoint())
    await store.patch_state(session.key, {"a": 1}, LATER)
    await store.start_turn(session, running(make_turn(session)))
    await store.ping()
    fork = await store.fork_session(session, None, make_session("fork"))
    path = {turns[0].turn_id, turns[1].turn_id, last.turn_id}
    listed = await store.list_turns(fork, 99)
    assert ({turn.turn_id for turn in listed.turns}, listed.total) == (path, 3)
    entries = await store.list_entries(fork, None, 99, newest_first=False)
    assert {entry.turn_id for entry in entries if isinstance(entry, Turn)} == path
    assert len(entries) == 3
    assert (await store.list_checkpoints(fork, 9)).total == 0
    with pytest.raises(TurnNotFound):
        await store.at_turn(fork, turns[2].turn_id)


async def test_keys_stay_with_the_origin(store: SessionStore) -> None:
    """A key finds its turn in the session in which it was sent, and nothing once that is deleted."""
    session = await stored_session(store)
    turn = make_turn(session, binding=Binding("", "key-1", fingerprint("hi")))
    session = await store.commit_turn(session, turn)
    fork = await store.fork_session(session, None, make_session("fork"))
    found = await store.find_bound("", "key-1")
    assert found is not None
    assert (found.session_id, found.turn.turn_id) == ("s1", turn.turn_id)
    await store.delete_session(session.key)
    assert await store.find_bound("", "key-1") is None
    assert (await store.get_turn(fork, turn.turn_id)).on_branch


async def test_a_fork_of_a_fork_is_whole(place: Place) -> None:
    """Three generations, of which the middle and the first are deleted, leave the last with its path."""
    store = place.store
    session, path = await extend(store, await stored_session(store), 2)
    for number in range(3):
        session = await store.fork_session(session, None, make_session(f"fork-{number}"))
        session, more = await extend(store, session, 1)
        path += more
    await store.delete_sessions([SessionKey("", "s1"), SessionKey("", "fork-0"), SessionKey("", "fork-1")])
    await check_branch(await place.restart("boot-2"), session, path)


async def test_a_fork_under_a_taken_key_is_refused(store: SessionStore) -> None:
    """Also under the origin's own key: SessionExists, and both sessions are as they were."""
    session, turns = await extend(store, await stored_session(store), 2)
    taken = await stored_session(store, "taken")
    for name in ("s1", "taken"):
        with pytest.raises(SessionExists):
            await store.fork_session(session, None, make_session(name))
    await check_branch(store, session, turns)
    await check_branch(store, taken, [])


async def test_a_fork_whose_target_is_missing_makes_no_session(store: SessionStore) -> None:
    """Another session's checkpoint, more turns than there are: refused, no session, no victim taken."""
    session, _ = await extend(store, await stored_session(store, user_id="u"), 2)
    other = await stored_session(store, "s2")
    foreign = await store.add_checkpoint(other, make_checkpoint())
    cap = SessionCap(1, (session,))
    for target, error in ((Back(3), InvalidInput), (ToCheckpoint(foreign.checkpoint_id), CheckpointNotFound)):
        with pytest.raises(error):
            await store.fork_session(session, target, make_session("fork", user_id="u"), cap)
    assert store.session_count_nowait() == 2
    assert await current(store, session) == session


async def test_a_cap_counts_forks(store: SessionStore) -> None:
    """At the cap a fork is refused, or takes a victim's place; one of another user is no matter."""
    session, turns = await extend(store, await stored_session(store, user_id="u"), 2)
    old = await stored_session(store, "old", user_id="u")
    with pytest.raises(SessionLimit):
        await store.fork_session(session, None, make_session("fork", user_id="u"), SessionCap(2))
    assert store.session_count_nowait() == 2
    await store.fork_session(session, None, make_session("other", user_id="v"), SessionCap(2))
    await store.fork_session(session, None, make_session("fork", user_id="u"), SessionCap(2, (old,)))
    assert await store.find_session(old.key) is None
    assert set(await store.list_keys("", user_id="u", limit=9)) == {
        SessionKey("", "s1"),
        SessionKey("", "fork"),
    }
    await check_branch(store, session, turns)


async def test_a_fork_may_take_the_place_of_its_origin(place: Place) -> None:
    """The origin is the only victim: it goes, and the fork has the whole path."""
    store = place.store
    session, turns = await extend(store, await stored_session(store, user_id="u"), 3)
    new = make_session("fork", user_id="u")
    fork = await store.fork_session(session, None, new, SessionCap(1, (session,)))
    assert await store.find_session(session.key) is None
    assert store.session_count_nowait() == 1
    await check_branch(await place.restart("boot-2"), fork, turns)


async def test_fifty_forks_at_once_are_fifty_sessions(store: SessionStore) -> None:
    """Each has the path, and their own turns do not meet."""
    session, turns = await extend(store, await stored_session(store), 3)
    forks = await asyncio.gather(
        *(store.fork_session(session, None, make_session(f"fork-{number}")) for number in range(50))
    )
    ended = await asyncio.gather(*(extend(store, fork, 2) for fork in forks))
    for fork, more in ended:
        assert (await store.load_path(fork)).messages == said([*turns, *more])
    assert store.session_count_nowait() == 51


async def test_a_fork_is_not_counted_as_use(store: SessionStore) -> None:
    """The user's usage is the same before and after."""
    session, _ = await extend(store, await stored_session(store, user_id="u"), 3)
    before = await store.get_usage("", "u", 9)
    await store.fork_session(session, None, make_session("fork", user_id="u"))
    assert await store.get_usage("", "u", 9) == before
    assert before.turns == 3
