"""What every store promises about moving: what one gives, any other takes, and it is the same there.

Memory, the reference, is at the other end of each copy: what is equal to it either way is equal
between any two.
"""

from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from app.domain.branch import Back, ToCheckpoint, ToTurn
from app.domain.dump import canonical
from app.domain.errors import SessionNotFound
from app.domain.idempotency import Binding, fingerprint
from app.domain.ids import SessionKey
from app.domain.journal import LoggedFact
from app.domain.session import Session
from app.domain.state import StateScope
from app.domain.turn import TurnError, TurnStatus, Usage
from app.ports import MovableStore
from app.stores.memory.store import MemoryStore

from .builders import BOOT, LIFE, T0, current, extend, make_note, make_session, make_turn, stored_session
from .conftest import Place
from .moving import (
    LATER,
    OWNERS,
    Full,
    all_reads,
    copy_all,
    dumped,
    fill,
    get_dump,
    refusal_of,
    start_running,
)
from .test_store_walk import Walk

FOR_EVER = T0 + 10**10
INTERRUPTED = TurnError("INTERRUPTED", "The process died while the turn ran.")


@pytest.fixture
async def store(place: Place) -> MovableStore:
    return place.store  # type: ignore[return-value]


@pytest.fixture
async def reference() -> AsyncIterator[MemoryStore]:
    store = MemoryStore(LIFE)
    await store.open(BOOT)
    yield store
    await store.close()


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what is not the same in both."""
    return [name for name in one | other if one.get(name) != other.get(name)]


async def test_what_was_copied_in_reads_as_the_original(
    place: Place, store: MovableStore, reference: MemoryStore
) -> None:
    """Every read of the port says of the copy what it says of the original, after a restart, too."""
    full = await fill(reference)
    await copy_all(reference, store)
    original = await all_reads(reference, full)
    assert differences(await all_reads(store, full), original) == []
    assert differences(await dumped(store), await dumped(reference)) == []
    again: Any = await place.restart("boot-2")
    assert differences(await all_reads(again, full), original) == []


async def test_what_was_copied_out_reads_as_the_original(store: MovableStore, reference: MemoryStore) -> None:
    """What the store gives makes another one that says the same, and gives the same."""
    full = await fill(store)
    await copy_all(store, reference)
    assert differences(await all_reads(reference, full), await all_reads(store, full)) == []
    assert differences(await dumped(reference), await dumped(store)) == []


async def test_a_second_copy_changes_nothing(store: MovableStore, reference: MemoryStore) -> None:
    """Loading everything twice leaves what loading it once left: records, counters, usage."""
    full = await fill(reference)
    await copy_all(reference, store)
    reads, given = await all_reads(store, full), await dumped(store)
    await copy_all(reference, store)
    assert differences(await all_reads(store, full), reads) == []
    assert differences(await dumped(store), given) == []


async def test_what_moves_into_itself_stays_as_it_is(place: Place, store: MovableStore) -> None:
    """Everything stored again in its own place, and the rest of it scrubbed away, reads as before."""
    full = await fill(store)
    reads, given = await all_reads(store, full), await dumped(store)
    await copy_all(store, store)
    await store.scrub()
    assert differences(await all_reads(store, full), reads) == []
    assert differences(await dumped(store), given) == []
    again: Any = await place.restart("boot-2")
    assert differences(await all_reads(again, full), reads) == []


async def test_a_copy_that_ended_early_is_repeated(store: MovableStore, reference: MemoryStore) -> None:
    """With half of the sessions there, some of them as they were before, another copy makes all the same."""
    full = await fill(reference)
    for key in (await reference.list_after(None, 99))[::2]:
        await store.load_session(await get_dump(reference, key))
    for key in full.keys[:5]:
        session = await reference.find_session(key)
        assert session is not None
        started = session.updated_at + 1000
        await reference.commit_turn(session, make_turn(session, "since then", started_at=started))
    await copy_all(reference, store)
    assert differences(await all_reads(store, full), await all_reads(reference, full)) == []
    assert differences(await dumped(store), await dumped(reference)) == []


async def test_a_copy_takes_the_place_of_what_was_there(store: MovableStore, reference: MemoryStore) -> None:
    """Another session under the same key, shared state and counters go; nothing of them is left behind."""
    other, _ = await extend(store, await stored_session(store, "tree", user_id="x", state={"old": 1}), 4)
    await store.patch_shared(StateScope("gone"), {"a": 1}, T0)
    full = await fill(reference)
    await copy_all(reference, store)
    assert differences(await all_reads(store, full), await all_reads(reference, full)) == []
    assert await store.get_shared(StateScope("gone")) == await reference.get_shared(StateScope("gone"))
    assert (await store.get_usage("", "x", 9)).turns == 0
    with pytest.raises(SessionNotFound):
        await store.commit_turn(other, make_turn(other))


@pytest.mark.parametrize("seed", range(3))
async def test_a_walk_goes_on_in_the_copy(place: Place, reference: MemoryStore, seed: int) -> None:
    """At each step after it was moved in, or out, a session does what it would have done in one store."""
    walk = Walk(reference, Random(seed))
    await walk.begin()
    home: Any = place.store
    for start, end in ((reference, home), (home, reference), (reference, home)):
        for _ in range(40):
            await walk.step()
        await copy_all(start, end)
        walk.store = end
        for session, model in (*walk.left, (walk.session, walk.model)):
            await walk.check(session, model)
        for key in await start.list_after(None, 99):
            await start.delete_session(key)


async def _moved(store: MovableStore, reference: MemoryStore) -> tuple[Full, Session]:
    full = await fill(reference)
    await copy_all(reference, store)
    return full, await current(store, await current_of(reference, full.keys[0]))


async def current_of(store: MovableStore, key: SessionKey) -> Session:
    session = await store.find_session(key)
    assert session is not None
    return session


async def test_a_moved_session_goes_on(store: MovableStore, reference: MemoryStore) -> None:
    """It takes turns, goes back, restores, forks, compacts, patches, each as before the move."""
    _, session = await _moved(store, reference)
    for one in (store, reference):
        new = "fork-of-copy" if one is store else "fork-of-original"
        at = session.updated_at + 1000
        after = await one.commit_turn(session, make_turn(session, "on", started_at=at))
        assert after.depth == session.depth + 1
        after = await one.patch_state(after.key, {"moved": True}, after.updated_at + 1)
        after = await one.move_head(after, Back(1), after.updated_at + 1)
        assert (after.head, after.state) == (session.head, session.state)
        oldest = (await one.list_checkpoints(after, 9)).checkpoints[-1]
        after = await one.move_head(after, ToCheckpoint(oldest.checkpoint_id), after.updated_at + 1)
        assert after.head == oldest.turn_id
        after = await one.add_note(after, make_note(after.head or ""), Usage(5, 5))
        fork = await one.fork_session(after, None, make_session(new, user_id="u"))
        assert (fork.head, fork.note, fork.state) == (after.head, after.note, after.state)
        assert (await one.at_turn(fork, None)).state == (await one.at_turn(after, None)).state
    copied, original = await current_of(store, session.key), await current_of(reference, session.key)
    assert (copied.rev, copied.state_rev, copied.state) == (original.rev, original.state_rev, original.state)


async def test_a_moved_storys_numbers_go_on(store: MovableStore, reference: MemoryStore) -> None:
    """The next fact in the copy has the number that it would have had in the original."""
    _, session = await _moved(store, reference)
    stories = []
    for one in (store, reference):
        after = await one.patch_state(session.key, {"moved": True}, session.updated_at + 1)
        after = await one.move_head(after, ToTurn(None), after.updated_at + 1)
        story = await one.list_entries(after, None, 99, newest_first=False)
        stories.append([entry for entry in story if isinstance(entry, LoggedFact)])
    assert stories[0] == stories[1]
    assert [fact.number for fact in stories[0]] == list(range(1, len(stories[0]) + 1))


async def test_moved_keys_answer_and_are_taken(store: MovableStore, reference: MemoryStore) -> None:
    """A committed turn's key finds it in the copy and is not given to another; a released one is free."""
    full, session = await _moved(store, reference)
    found = await store.find_bound("", "key-1")
    assert found is not None
    assert (found.session_id, found.fingerprint) == ("tree", fingerprint(1))
    assert found.turn == await store.get_turn(session, found.turn.turn_id)
    other = await current_of(store, full.keys[-1])
    for key in ("key-1", "released"):
        turn = make_turn(other, binding=Binding("", key, b"o" * 16), started_at=LATER + 5000)
        other = await store.commit_turn(other, turn)
    assert await store.find_bound("", "key-1") == found
    released = await store.find_bound("", "released")
    assert released is not None
    assert released.session_id == other.key.session_id


async def test_moved_sessions_end(store: MovableStore, reference: MemoryStore) -> None:
    """They expire, are purged and deleted, with all that they have; the sums of both stores stay equal."""
    full, session = await _moved(store, reference)
    for one in (store, reference):
        assert await one.delete_session(session.key)
        assert await one.find_bound("", "key-1") is None
        await one.expire_and_purge(FOR_EVER, 999)
    left = await reference.list_after(None, 99)
    assert 0 < len(left) < len(full.keys)
    assert await store.list_after(None, 99) == left
    assert await store.get_session_stats() == await reference.get_session_stats()
    assert differences(await dumped(store), await dumped(reference)) == []


async def test_new_sessions_are_counted_on(store: MovableStore, reference: MemoryStore) -> None:
    """Statistics and usage go on from what was moved."""
    await _moved(store, reference)
    for one in (store, reference):
        await extend(one, await stored_session(one, "new", owner="bob", user_id="u", now=LATER), 3)
        await one.expire_and_purge(LATER, 0)
    assert await store.get_session_stats() == await reference.get_session_stats()
    assert await store.get_usage("bob", "u", 9) == await reference.get_usage("bob", "u", 9)


async def test_a_turn_that_runs_has_failed_in_the_copy(store: MovableStore, reference: MemoryStore) -> None:
    """It is INTERRUPTED there from its start on, holds no key, and was counted nowhere."""
    session, turn_id = await start_running(reference)
    dump = await get_dump(reference, session.key)
    assert [dumped.turn.status for dumped in dump.turns] == [TurnStatus.RUNNING]
    await store.load_session(dump)
    turn = await store.get_turn(session, turn_id)
    assert (turn.status, turn.error, turn.finished_at) == (TurnStatus.FAILED, INTERRUPTED, turn.started_at)
    assert canonical(await get_dump(store, session.key)) == canonical(dump.settled())
    assert (await store.get_session_stats()).turns_failed == 0
    again = make_turn(session, binding=Binding("", "of-running", b"x" * 16), started_at=LATER)
    await store.commit_turn(session, again)
    found = await store.find_bound("", "of-running")
    assert found is not None
    assert found.turn.turn_id == again.turn_id
    assert await refusal_of(store, session, turn_id) == "TURN_NOT_FOUND"


async def test_a_running_turn_is_given_as_it_runs(store: MovableStore) -> None:
    """A dump has the start record with its key, and nothing of the session is changed by it."""
    session, turn_id = await start_running(store)
    (only,) = (await get_dump(store, session.key)).turns
    assert (only.turn.turn_id, only.turn.status, only.state) == (turn_id, TurnStatus.RUNNING, None)
    assert only.turn.binding == Binding("", "of-running", b"r" * 16)
    assert await current(store, session) == session


async def test_a_key_goes_to_who_is_loaded_last(store: MovableStore, reference: MemoryStore) -> None:
    """A key that belongs to another committed turn by now is taken from it."""
    binding = Binding("", "k", b"k" * 16)
    for one, name in ((store, "old"), (reference, "new")):
        session = await stored_session(one, name)
        await one.commit_turn(session, make_turn(session, name, binding=binding))
    await store.load_session(await get_dump(reference, SessionKey("", "new")))
    found = await store.find_bound("", "k")
    assert found is not None
    assert (found.session_id, found.turn.input) == ("new", "new")
    old = await get_dump(store, SessionKey("", "old"))
    assert [dumped.turn.binding for dumped in old.turns] == [None]


@pytest.mark.parametrize("limit", [1, 3, 99])
async def test_sessions_are_listed_page_by_page_in_one_order(store: MovableStore, limit: int) -> None:
    """By owner, then by id, each by code points; after one that is not there as after one that is."""
    names = ["a", "B", "b", "b.", "b1", "b:", "~".join("zz"), "10", "9"]
    keys = [SessionKey(owner, name) for owner in (*OWNERS, "\uffff", "🦊") for name in names]
    await store.create_sessions([make_session(key.session_id, owner=key.owner) for key in keys])
    found: list[SessionKey] = []
    while page := await store.list_after(found[-1] if found else None, limit):
        assert len(page) <= limit
        found += page
    assert found == sorted(keys)
    assert await store.list_after(SessionKey("alice", "b0"), 1) == (SessionKey("alice", "b1"),)
    assert await store.list_after(SessionKey("aaa", ""), 1) == (SessionKey("alice", "10"),)


async def test_a_missing_session_has_no_dump(store: MovableStore) -> None:
    """Neither one that never was nor one that was deleted; of an empty store nothing is listed."""
    assert await store.list_after(None, 9) == ()
    session = await stored_session(store)
    await store.delete_session(session.key)
    for key in (session.key, SessionKey("x", "y")):
        assert await store.dump_session(key) is None


async def test_the_rest_counts_what_is_gone(store: MovableStore) -> None:
    """Sessions count where they are loaded, so of them only those that are gone; turns all the same."""
    gone, _ = await extend(store, await stored_session(store, "gone", user_id="u"), 2)
    kept, _ = await extend(store, await stored_session(store, "kept"), 3)
    await store.delete_session(gone.key)
    rest = await store.dump_rest()
    lifetime_ms = gone.last_accessed - gone.created_at
    assert (rest.totals["created"], rest.totals["lifetime_ms"]) == (1, lifetime_ms)
    assert (rest.totals["turns"], rest.totals["turns_finished"], rest.totals["response_ms"]) == (
        5,
        5,
        5 * 812,
    )
    assert sum(count for name, count in rest.totals.items() if name.startswith("ms:")) == 5
    assert [(one.user_id, one.usage.turns) for one in rest.usage] == [("u", 2)]
    for _ in range(2):
        await store.load_session(await get_dump(store, kept.key))
        await store.load_rest(rest)
        stats = await store.get_session_stats()
        assert (stats.total, stats.created, stats.turns) == (1, 2, 5)
        assert stats.lifetime_ms == lifetime_ms + kept.last_accessed - kept.created_at


async def test_an_empty_store_moves(store: MovableStore, reference: MemoryStore) -> None:
    """Nothing gives nothing, and takes what was counted away."""
    await extend(store, await stored_session(store, user_id="u"), 2)
    await store.delete_session(SessionKey("", "s1"))
    rest = await reference.dump_rest()
    assert (rest.shared, rest.usage, any(rest.totals.values())) == ((), (), False)
    await store.load_rest(rest)
    assert await store.get_session_stats() == await reference.get_session_stats()
    assert (await store.get_usage("", "u", 9)).turns == 0


async def test_a_dump_is_whole(store: MovableStore) -> None:
    """Of each session that was made in the usual ways, nothing is missing."""
    full = await fill(store)
    for key in full.keys:
        assert (await get_dump(store, key)).is_whole()
