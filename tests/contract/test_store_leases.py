"""What every store promises that several processes share: who has a session, and what a lost lease costs."""

import asyncio
from dataclasses import replace

import pytest

from app.domain.errors import (
    HeadMoved,
    KeyTaken,
    LeasedElsewhere,
    SessionLimit,
    SessionNotFound,
    TurnNotFound,
)
from app.domain.idempotency import Binding
from app.domain.ids import SessionKey
from app.domain.lease import Holder, Node
from app.domain.session import Session, SessionCap, SessionChange
from app.domain.turn import TurnStatus
from app.ports import SessionLeases, SessionStore

from .builders import BOOT, LIFE, T0, dropped, make_session, make_turn, new_id, running
from .conftest import URL, SharedPlace

OTHER = "boot-2"
HERE = Node(BOOT, URL)
SHORT_S = 0.3
PROMPTLY_S = 2.0
short = pytest.mark.parametrize("lease_s", [SHORT_S])


def leases_of(store: SessionStore) -> SessionLeases:
    assert store.leases is not None
    return store.leases


async def begin(place: SharedPlace, **fields: object) -> tuple[SessionStore, SessionStore, Session]:
    """Return the stores of two processes, and a session that both know."""
    session = make_session(**fields)
    await place.store.create_session(session)
    return place.store, await place.beside(OTHER, "http://127.0.0.1:1002"), session


async def outlast(store: SessionStore, session: Session) -> None:
    """Return when the session's lease has run out."""
    async with asyncio.timeout(PROMPTLY_S):
        while await leases_of(store).holder(session.key) is not None:
            await leases_of(store).wait_free(session.key, PROMPTLY_S)


async def test_a_turn_keeps_other_processes_away(shared_place: SharedPlace) -> None:
    """While a turn runs nobody else gets the session, and they are told who has it."""
    here, there, session = await begin(shared_place)
    turn = running(make_turn(session))
    assert await here.start_turn(session, turn) is None
    holder = Holder(HERE, turn.turn_id, is_turn=True)
    with pytest.raises(LeasedElsewhere) as told:
        await there.start_turn(session, running(make_turn(session)))
    assert told.value.holder == holder
    assert (told.value.turn_id, told.value.session_id) == (turn.turn_id, session.key.session_id)
    with pytest.raises(LeasedElsewhere):
        await leases_of(there).take(session.key, "a hold")
    assert await leases_of(there).holder(session.key) == holder
    assert [t.turn_id for t in (await there.list_turns(session, 9)).turns] == [turn.turn_id]


async def test_another_turn_of_the_same_process_is_kept_away_too(shared_place: SharedPlace) -> None:
    """A lease belongs to one turn, not to a process."""
    here, _, session = await begin(shared_place)
    await here.start_turn(session, running(make_turn(session)))
    with pytest.raises(LeasedElsewhere):
        await here.start_turn(session, running(make_turn(session)))


async def test_the_end_of_a_turn_gives_its_lease_back(shared_place: SharedPlace) -> None:
    """After a commit, and after a failed turn was recorded, the next process has the session at once."""
    here, there, session = await begin(shared_place)
    turn = make_turn(session)
    await here.start_turn(session, running(turn))
    session = await here.commit_turn(session, turn)
    assert await leases_of(there).holder(session.key) is None
    second = make_turn(session)
    assert await there.start_turn(session, running(second)) is None
    await there.record_turn(session, dropped(second))
    assert await leases_of(here).holder(session.key) is None
    touched = await here.find_session(session.key)
    assert touched is not None
    assert touched.head == turn.turn_id
    assert await here.start_turn(touched, running(make_turn(touched))) is None


async def test_who_knows_an_old_session_gets_the_new_one_with_the_lease(shared_place: SharedPlace) -> None:
    """A start from an old head notes nothing, but returns the session as it is and keeps it from others."""
    here, there, old = await begin(shared_place)
    first = make_turn(old)
    await there.start_turn(old, running(first))
    committed = await there.commit_turn(old, first)
    turn = make_turn(old)
    told = await here.start_turn(old, running(turn))
    assert told is not None
    assert told == await there.find_session(old.key)
    assert told.head == committed.head == first.turn_id
    assert [t.turn_id for t in (await there.list_turns(told, 9)).turns] == [first.turn_id]
    with pytest.raises(LeasedElsewhere):
        await there.start_turn(told, running(make_turn(told)))
    again = replace(make_turn(told), turn_id=turn.turn_id)
    assert await here.start_turn(told, running(again)) is None
    assert (await here.commit_turn(told, again)).depth == 2


async def test_a_change_of_the_record_counts_as_old(shared_place: SharedPlace) -> None:
    """What another process changed by hand, the record or the state, is told before the turn starts."""
    here, there, old = await begin(shared_place)
    changed = await there.update_session(old.key, SessionChange(title="new"), T0 + 1)
    turn = running(make_turn(old))
    assert await here.start_turn(old, turn) == changed
    patched = await there.patch_state(old.key, {"mood": "good"}, T0 + 2)
    assert await here.start_turn(changed, turn) == patched
    assert await here.start_turn(patched, turn) is None


async def test_a_start_may_be_repeated(shared_place: SharedPlace) -> None:
    """A repeated start, whose first reply was lost, notes the turn once and keeps the lease."""
    here, there, session = await begin(shared_place)
    turn = running(make_turn(session))
    for _ in range(3):
        assert await here.start_turn(session, turn) is None
    assert len((await there.list_turns(session, 9)).turns) == 1
    assert (await here.commit_turn(session, make_turn(session, turn_id=turn.turn_id))).depth == 1


@short
async def test_a_lease_that_ran_out_is_taken_over(shared_place: SharedPlace) -> None:
    """The paused owner: B takes over and commits; A's turn is failed, its commit refused, history is B's."""
    here, there, session = await begin(shared_place)
    paused = make_turn(session)
    await here.start_turn(session, running(paused))
    await outlast(there, session)
    turn = make_turn(session)
    assert await there.start_turn(session, running(turn)) is None
    found = await there.get_turn(session, paused.turn_id)
    assert (found.status, found.error and found.error.code) == (TurnStatus.FAILED, "INTERRUPTED")
    current = await there.find_session(session.key)
    assert current is not None
    await there.commit_turn(current, turn)
    with pytest.raises(HeadMoved):
        await here.commit_turn(session, paused)
    assert [t.turn_id for t in await here.list_branch(await find(here, session), 9)] == [turn.turn_id]
    assert await leases_of(here).renew([(session.key, paused.turn_id)]) == (False,)


async def find(store: SessionStore, session: Session) -> Session:
    found = await store.find_session(session.key)
    assert found is not None
    return found


@short
async def test_who_was_ended_by_others_cannot_commit(
    shared_place: SharedPlace,
) -> None:
    """Once the record says that a turn was abandoned it stays so, also if nobody committed since."""
    here, there, session = await begin(shared_place)
    paused = make_turn(session)
    await here.start_turn(session, running(paused))
    await outlast(there, session)
    assert await leases_of(there).reap(10) == 1
    assert await leases_of(there).reap(10) == 0
    with pytest.raises(HeadMoved):
        await here.commit_turn(session, paused)
    with pytest.raises(HeadMoved):
        await here.start_turn(session, running(paused))
    assert await leases_of(there).holder(session.key) is None


@short
async def test_a_lease_that_ran_out_and_that_nobody_took_may_go_on(shared_place: SharedPlace) -> None:
    """A pause that nobody noticed costs nothing: the lease is taken again, and the commit is accepted."""
    here, there, session = await begin(shared_place)
    turn = make_turn(session)
    await here.start_turn(session, running(turn))
    await outlast(there, session)
    assert await leases_of(here).renew([(session.key, turn.turn_id)]) == (True,)
    assert await leases_of(there).holder(session.key) == Holder(HERE, turn.turn_id, is_turn=True)
    await outlast(there, session)
    assert (await here.commit_turn(session, turn)).head == turn.turn_id


@short
async def test_a_renewed_lease_outlasts_its_first_end(shared_place: SharedPlace) -> None:
    """Renewing keeps the session, as long as it is repeated."""
    here, there, session = await begin(shared_place)
    turn = running(make_turn(session))
    await here.start_turn(session, turn)
    loop = asyncio.get_running_loop()
    end = loop.time() + 2 * SHORT_S
    while loop.time() < end:
        await leases_of(there).wait_free(session.key, SHORT_S / 4)
        assert await leases_of(here).renew([(session.key, turn.turn_id)]) == (True,)
    assert await leases_of(there).holder(session.key) is not None


async def test_renewals_are_told_one_by_one(shared_place: SharedPlace) -> None:
    """Of several leases each gets its own answer: held, never held, another's, deleted session's."""
    here, there, session = await begin(shared_place)
    turn = running(make_turn(session))
    await here.start_turn(session, turn)
    gone = make_session("gone")
    await here.create_session(gone)
    lost = running(make_turn(gone))
    await here.start_turn(gone, lost)
    assert await there.delete_session(gone.key)
    held = [
        (session.key, turn.turn_id),
        (session.key, new_id()),
        (SessionKey("", "never"), new_id()),
        (gone.key, lost.turn_id),
    ]
    assert await leases_of(here).renew(held) == (True, False, False, False)
    assert await leases_of(here).renew([]) == ()


async def test_giving_back_leaves_no_trace_of_a_start(shared_place: SharedPlace) -> None:
    """A turn that is refused after its start record is as though it never was; its key is free."""
    here, there, session = await begin(shared_place)
    binding = Binding("", "k1", b"f" * 32)
    turn = replace(running(make_turn(session)), binding=binding)
    await here.start_turn(session, turn)
    await leases_of(here).give_back(session.key, turn.turn_id)
    await leases_of(here).give_back(session.key, turn.turn_id)
    with pytest.raises(TurnNotFound):
        await there.get_turn(session, turn.turn_id)
    again = replace(running(make_turn(session)), binding=binding)
    assert await there.start_turn(await find(there, session), again) is None
    await leases_of(here).give_back(session.key, turn.turn_id)
    assert await leases_of(here).holder(session.key) is not None


async def test_a_hold_needs_no_session(shared_place: SharedPlace) -> None:
    """A session can be had to oneself, made or not, and repeated taking under one nonce is one hold."""
    here, there, session = await begin(shared_place)
    missing = SessionKey("o", "never made")
    for key in (session.key, missing):
        await leases_of(here).take(key, "n1")
        await leases_of(here).take(key, "n1")
        assert await leases_of(there).holder(key) == Holder(HERE, "n1", is_turn=False)
        with pytest.raises(LeasedElsewhere) as told:
            await leases_of(there).take(key, "n2")
        assert told.value.turn_id is None
        await leases_of(there).give_back(key, "n2")
        with pytest.raises(LeasedElsewhere):
            await leases_of(there).take(key, "n2")
        await leases_of(here).give_back(key, "n1")
        await leases_of(there).take(key, "n2")
    with pytest.raises(LeasedElsewhere):
        await here.start_turn(session, running(make_turn(session)))


async def test_a_turn_may_begin_with_a_hold(shared_place: SharedPlace) -> None:
    """Who has a session under a turn's id starts that turn in it, and the turn's end gives it back."""
    here, there, session = await begin(shared_place)
    turn = make_turn(session)
    await leases_of(here).take(session.key, turn.turn_id)
    assert await here.start_turn(session, running(turn)) is None
    assert await leases_of(there).holder(session.key) == Holder(HERE, turn.turn_id, is_turn=True)
    await here.commit_turn(session, turn)
    assert await leases_of(there).holder(session.key) is None


@short
async def test_a_hold_that_ran_out_gives_way(shared_place: SharedPlace) -> None:
    """What held a session and died is in nobody's way once its lease is over."""
    here, there, session = await begin(shared_place)
    await leases_of(here).take(session.key, "n1")
    await outlast(there, session)
    assert await there.start_turn(session, running(make_turn(session))) is None
    assert await leases_of(here).renew([(session.key, "n1")]) == (False,)


async def test_who_waits_is_woken(shared_place: SharedPlace) -> None:
    """A process that waits for a session goes on soon after another gives it back, by whatever end."""
    here, there, session = await begin(shared_place)

    async def commit() -> None:
        await here.commit_turn(session, first)

    async def give_back() -> None:
        await leases_of(here).give_back(session.key, "n1")

    async def record() -> None:
        await here.record_turn(session, dropped(third))

    first = make_turn(session)
    await here.start_turn(session, running(first))
    await assert_wakes(there, session, commit)
    session = await find(here, session)
    await leases_of(here).take(session.key, "n1")
    await assert_wakes(there, session, give_back)
    third = make_turn(session)
    await here.start_turn(session, running(third))
    await assert_wakes(there, session, record)


async def test_who_waits_for_a_process_that_closes_is_woken(shared_place: SharedPlace) -> None:
    """A process that ends in good order lets its leases go, and who waits for one hears of it."""
    here, there, session = await begin(shared_place)
    turn = make_turn(session)
    await there.start_turn(session, running(turn))
    await assert_wakes(here, session, there.close)


async def assert_wakes(store: SessionStore, session: Session, free: object) -> None:
    loop = asyncio.get_running_loop()
    waiting = loop.create_task(leases_of(store).wait_free(session.key, 20.0))
    await leases_of(store).wait_free(session.key, 0.1)  # long enough for the other to have begun
    assert not waiting.done()
    began = loop.time()
    await free()  # type: ignore[operator]
    await waiting
    assert loop.time() - began < PROMPTLY_S
    assert await leases_of(store).holder(session.key) is None


async def test_waiting_has_a_limit_and_an_end(shared_place: SharedPlace) -> None:
    """Waiting for a free session returns at once, for a held one after the limit; it can be cancelled."""
    here, there, session = await begin(shared_place)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await leases_of(there).wait_free(session.key, 20.0)
    assert loop.time() - began < PROMPTLY_S
    await leases_of(here).take(session.key, "n1")
    began = loop.time()
    await leases_of(there).wait_free(session.key, 0.2)
    assert loop.time() - began >= 0.15
    waiting = loop.create_task(leases_of(there).wait_free(session.key, 20.0))
    await leases_of(there).wait_free(session.key, 0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await leases_of(here).give_back(session.key, "n1")
    await leases_of(there).take(session.key, "n2")


async def test_a_key_is_one_turn_s_across_processes(shared_place: SharedPlace) -> None:
    """While a turn with a key runs, and once it is committed, no other turn starts with that key."""
    here, there, session = await begin(shared_place)
    other = make_session("s2")
    await here.create_session(other)
    binding = Binding("", "k1", b"f" * 32)
    turn = make_turn(session, binding=binding)
    await here.start_turn(session, running(turn))
    rival = replace(running(make_turn(other)), binding=binding)
    with pytest.raises(KeyTaken) as told:
        await there.start_turn(other, rival)
    assert told.value.holder == Holder(HERE, turn.turn_id, is_turn=True)
    assert await leases_of(there).holder(other.key) is None
    for store in (here, there):
        with pytest.raises(KeyTaken) as told:
            await store.find_bound("", "k1")
        assert told.value.holder == Holder(HERE, turn.turn_id, is_turn=True)
    with pytest.raises(KeyTaken):  # of the same session, too, and rather than that the session is busy
        await there.start_turn(session, replace(running(make_turn(session)), binding=binding))
    await here.commit_turn(session, turn)
    with pytest.raises(KeyTaken) as told:
        await there.start_turn(other, rival)
    assert told.value.holder is None
    bound = await there.find_bound("", "k1")
    assert bound is not None
    assert bound.turn.turn_id == turn.turn_id


@short
async def test_the_key_of_an_abandoned_turn_is_free(shared_place: SharedPlace) -> None:
    """A key is not lost with the process that used it: the record says that the attempt was abandoned."""
    here, there, session = await begin(shared_place)
    other = make_session("s2")
    await here.create_session(other)
    binding = Binding("", "k1", b"f" * 32)
    lost = make_turn(session, binding=binding)
    await here.start_turn(session, running(lost))
    await outlast(there, session)
    assert await there.find_bound("", "k1") is None
    turn = make_turn(other, binding=binding)
    assert await there.start_turn(other, running(turn)) is None
    assert await leases_of(here).renew([(session.key, lost.turn_id)]) == (False,)
    assert await leases_of(there).holder(session.key) is None
    assert (await there.get_turn(session, lost.turn_id)).status is TurnStatus.FAILED
    await there.commit_turn(other, turn)
    with pytest.raises(HeadMoved):
        await here.commit_turn(session, lost)
    bound = await there.find_bound("", "k1")
    assert bound is not None
    assert bound.turn.turn_id == turn.turn_id


async def test_a_turn_of_a_deleted_session_neither_starts_nor_ends(shared_place: SharedPlace) -> None:
    """Deleting takes the lease with it; a new incarnation is not reached by turns of the old one."""
    here, there, session = await begin(shared_place)
    turn = make_turn(session)
    await here.start_turn(session, running(turn))
    assert await there.delete_session(session.key)
    assert await leases_of(there).holder(session.key) is None
    with pytest.raises(SessionNotFound):
        await here.commit_turn(session, turn)
    await there.create_session(make_session())
    for late in (turn, make_turn(session)):
        with pytest.raises(SessionNotFound):
            await here.start_turn(session, running(late))
    assert await leases_of(there).holder(session.key) is None


async def test_a_leased_session_is_not_taken_away(shared_place: SharedPlace) -> None:
    """Neither a newcomer under its user's cap nor the sweep removes a session whose turn runs elsewhere."""
    here, there, session = await begin(shared_place, user_id="u")
    await here.start_turn(session, running(make_turn(session)))
    victim = await find(there, session)
    cap = SessionCap(1, (victim,))
    outcomes = await there.create_sessions([make_session("s2", user_id="u")], cap)
    assert isinstance(outcomes[0], SessionLimit)
    long_after = T0 + 1000 * (LIFE.ttl_s + LIFE.retention_s) * 10
    assert (await there.expire_and_purge(long_after, 10))[1] == 0
    assert await there.find_session(session.key) is not None


async def test_one_of_many_gets_it(shared_place: SharedPlace) -> None:
    """Of forty turns that start at once on two processes one has the session."""
    here, there, session = await begin(shared_place)
    starts = (s.start_turn(session, running(make_turn(session))) for s in (here, there) * 20)
    results = await asyncio.gather(*starts, return_exceptions=True)
    assert results.count(None) == 1
    assert sum(isinstance(result, LeasedElsewhere) for result in results) == 39


@short
async def test_processes_know_each_other(shared_place: SharedPlace) -> None:
    """Whoever has announced himself is listed with his address until that is too old; all have one secret."""
    here, there, session = await begin(shared_place)
    await leases_of(here).announce()
    await leases_of(here).announce()
    await leases_of(there).announce()
    assert set(await leases_of(there).nodes()) == {HERE, Node(OTHER, "http://127.0.0.1:1002")}
    await leases_of(there).take(session.key, "a clock")
    await outlast(there, session)
    await leases_of(there).announce()
    assert await leases_of(here).nodes() == (Node(OTHER, "http://127.0.0.1:1002"),)
    secrets = await asyncio.gather(leases_of(here).secret(), leases_of(there).secret())
    assert secrets[0] == secrets[1]
    assert len(secrets[0]) >= 32


async def test_what_was_seen_last_is_remembered(shared_place: SharedPlace) -> None:
    """What this process read or wrote is recalled as it was then, or not at all; never a deleted one."""
    here, there, session = await begin(shared_place)
    known = here.recall_session(session.key)
    assert known in (None, session)
    turn = make_turn(session)
    await there.commit_turn(session, turn)
    read = await find(here, session)
    assert here.recall_session(session.key) in (None, read)
    await here.delete_session(session.key)
    assert here.recall_session(session.key) is None
