"""What every store promises about a session's story: turns and logged facts, in one order, both ways."""

import asyncio
from dataclasses import replace

import pytest

from app.domain.branch import Back, HeadCause, ToCheckpoint, ToTurn
from app.domain.journal import (
    LAST,
    Compacted,
    Entry,
    HeadChanged,
    LoggedFact,
    Position,
    StateChanged,
    position_of,
)
from app.domain.session import LifeSpan, Session
from app.domain.turn import Turn, TurnStatus, Usage
from app.ports import SessionStore

from .builders import (
    BOOT,
    LIFE,
    T0,
    current,
    dropped,
    extend,
    failed,
    make_checkpoint,
    make_note,
    make_turn,
    running,
    stored_session,
)
from .conftest import Place


def plain(entries: tuple[Entry, ...]) -> list[Entry]:
    """Return the entries without what is computed when a turn is read."""
    return [replace(e, on_branch=False) if isinstance(e, Turn) else e for e in entries]


async def story(store: SessionStore, session: Session) -> list[Entry]:
    return plain(await store.list_entries(session, None, 1000, newest_first=False))


async def facts(store: SessionStore, session: Session) -> list[LoggedFact]:
    return [entry for entry in await story(store, session) if isinstance(entry, LoggedFact)]


async def make_story(store: SessionStore, session: Session) -> Session:
    """Make twelve entries of all kinds, a second apart."""
    session, turns = await extend(store, session, 2)  # from T0 + 1 s, and T0 + 2 s
    await store.record_turn(session, failed(make_turn(session, started_at=T0 + 3000)))
    await store.patch_state(session.key, {"a": 1}, T0 + 4000)
    session = await store.add_note(session, make_note(turns[0].turn_id, created_at=T0 + 5000), Usage(1, 1))
    made = await store.add_checkpoint(session, make_checkpoint(created_at=T0 + 5500))
    session = await store.move_head(session, Back(1), T0 + 6000)
    session = await store.commit_turn(session, make_turn(session, started_at=T0 + 7000))
    session = await store.move_head(session, ToCheckpoint(made.checkpoint_id), T0 + 8000)
    await store.record_turn(session, dropped(make_turn(session, started_at=T0 + 9000)))
    session = await store.move_head(session, ToTurn(None), T0 + 10_000)
    await store.patch_state(session.key, {"a": None}, T0 + 11_000)
    session = await current(store, session)
    await store.start_turn(session, running(make_turn(session, started_at=T0 + 12_000)))
    await store.ping()
    return await current(store, session)


async def test_the_story_is_told_in_order(place: Place) -> None:
    """Turns of every end, a running one and all facts, in the order in which they began; also restarted."""
    session = await make_story(place.store, await stored_session(place.store))
    for life in (1, 2):
        store = place.store if life == 1 else await place.restart(BOOT)
        told = await story(store, session)
        assert [position_of(entry).time_ms for entry in told] == [T0 + 1000 * n for n in range(1, 13)]
        turns = [entry for entry in told if isinstance(entry, Turn)]
        assert [turn.status for turn in turns] == [
            TurnStatus.FINISHED,
            TurnStatus.FINISHED,
            TurnStatus.FAILED,
            TurnStatus.FINISHED,
            TurnStatus.CANCELLED,
            TurnStatus.RUNNING,
        ]
        for turn in turns:
            assert replace(await store.get_turn(session, turn.turn_id), on_branch=False) == turn
        assert len(told) == 12


async def test_facts_say_what_happened(store: SessionStore) -> None:
    """Each move with its cause, from where and to where; notes and patches; numbered from 1."""
    session = await make_story(store, await stored_session(store))
    told = await facts(store, session)
    assert [fact.number for fact in told] == [1, 2, 3, 4, 5, 6]
    turns = [entry for entry in await story(store, session) if isinstance(entry, Turn)]
    one, two, _, three = (turn.turn_id for turn in turns[:4])
    (checkpoint,) = (await store.list_checkpoints(session, 9)).checkpoints
    (note_id,) = [fact.fact.note_id for fact in told if isinstance(fact.fact, Compacted)]
    assert [fact.fact for fact in told] == [
        StateChanged({"a": 1}),
        Compacted(note_id, one),
        HeadChanged(HeadCause.REWIND, two, one),
        HeadChanged(HeadCause.RESTORE, three, two, checkpoint.checkpoint_id),
        HeadChanged(HeadCause.REWIND, two, None),
        StateChanged({"a": None}),
    ]
    assert [fact.created_at for fact in told] == [T0 + 1000 * n for n in (4, 5, 6, 8, 10, 11)]


async def test_the_story_is_read_both_ways_from_any_place(store: SessionStore) -> None:
    """Beyond each entry, upwards and downwards, come exactly the others, the nearest first."""
    session = await make_story(store, await stored_session(store))
    told = await story(store, session)
    assert plain(await store.list_entries(session, None, 99, newest_first=True)) == told[::-1]
    for number, entry in enumerate(told):
        here = position_of(entry)
        for limit in (1, 3, 99):
            after = await store.list_entries(session, here, limit, newest_first=False)
            before = await store.list_entries(session, here, limit, newest_first=True)
            assert plain(after) == told[number + 1 :][:limit]
            assert plain(before) == told[:number][::-1][:limit]


async def test_a_position_may_lie_between_entries(store: SessionStore) -> None:
    """A time alone is before all of its millisecond, with ``LAST`` behind them; also where nothing is."""
    session = await make_story(store, await stored_session(store))
    told = await story(store, session)
    times = [position_of(entry).time_ms for entry in told]
    for time_ms in (0, T0, T0 + 1000, T0 + 4000, T0 + 4001, T0 + 12_000, T0 + 10**9):
        for tie in ("", LAST):
            here = Position(time_ms, tie)
            split = sum(time < time_ms or (time == time_ms and tie == LAST) for time in times)
            after = await store.list_entries(session, here, 99, newest_first=False)
            before = await store.list_entries(session, here, 99, newest_first=True)
            assert plain(after) == told[split:]
            assert plain(before) == told[:split][::-1]


async def test_entries_of_one_millisecond_have_an_order(store: SessionStore) -> None:
    """Turns by id, then facts, which come a millisecond later, by number; in pages each is there once."""
    session = await stored_session(store)
    turns = [failed(make_turn(session, started_at=T0, finished_at=T0)) for _ in range(12)]
    for turn in reversed(turns):
        await store.record_turn(session, turn)
        await store.patch_state(session.key, {"a": turn.turn_id}, T0)
    expected = [
        *turns,
        *(
            LoggedFact(number, T0 + 1, StateChanged({"a": turn.turn_id}))
            for number, turn in enumerate(reversed(turns), start=1)
        ),
    ]
    assert await story(store, session) == expected
    for limit in (1, 5, 12, 13):
        for newest_first in (False, True):
            found: list[Entry] = []
            position = None
            while page := await store.list_entries(session, position, limit, newest_first=newest_first):
                found += page
                position = position_of(page[-1])
            assert plain(tuple(found)) == (expected[::-1] if newest_first else expected)


async def test_time_never_goes_back(store: SessionStore) -> None:
    """A fact of a clock that was set back is told behind what was before it."""
    session, _ = await extend(store, await stored_session(store), 1)
    ended = session.last_accessed
    await store.patch_state(session.key, {"a": 1}, T0 - 5000)
    await store.patch_state(session.key, {"a": 2}, T0 + 90_000)
    session = await store.move_head(session, Back(1), T0 + 10)
    await store.patch_state(session.key, {"a": 3}, 0)
    assert [(fact.number, fact.created_at) for fact in await facts(store, session)] == [
        (1, ended + 1),
        (2, T0 + 90_000),
        (3, T0 + 90_000),
        (4, T0 + 90_001),
    ]


async def test_a_turn_keeps_its_place_when_it_ends(store: SessionStore) -> None:
    """It is listed where it began, running and then ended, before what happened while it ran."""
    session = await stored_session(store)
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    await store.patch_state(session.key, {"a": 1}, turn.started_at + 5)
    fact = LoggedFact(1, turn.started_at + 5, StateChanged({"a": 1}))
    assert await story(store, session) == [running(turn), fact]
    await store.commit_turn(session, turn)
    assert await story(store, session) == [turn, fact]


async def test_paging_while_writing_gives_each_once(store: SessionStore) -> None:
    """Upwards in pages of 3, with turns and facts added between pages, nothing is lost or repeated."""
    session = await stored_session(store)
    found: list[Entry] = []
    position = None
    for number in range(40):
        time_ms = T0 + 10 * number
        if number < 30 and number % 3:
            turn = make_turn(session, started_at=time_ms, finished_at=time_ms + 5)
            await store.start_turn(session, running(turn))
            session = await store.commit_turn(session, turn)
        elif number < 30:
            await store.patch_state(session.key, {"n": number}, time_ms)
        if number % 2:
            page = await store.list_entries(session, position, 3, newest_first=False)
            found += page
            position = position_of(page[-1]) if page else position
    assert len(found) == 30
    assert plain(tuple(found)) == await story(store, session)


async def test_paging_backwards_while_writing_gives_what_was_there(store: SessionStore) -> None:
    """Downwards from the newest, what is added meanwhile is not seen, and nothing else is lost."""
    session = await make_story(store, await stored_session(store))
    before = await story(store, session)
    found: list[Entry] = []
    position = None
    while page := await store.list_entries(session, position, 2, newest_first=True):
        found += page
        position = position_of(page[-1])
        await store.patch_state(session.key, {"n": len(found)}, T0 + 60_000)
    assert plain(tuple(found)) == before[::-1]
    assert len(await story(store, session)) == 12 + 6


@pytest.mark.parametrize("life", [replace(LIFE, event_limit=5)])
async def test_only_the_newest_facts_stay(place: Place, life: LifeSpan) -> None:
    """With a limit the oldest facts go, each time one is added; turns never, and the numbers go on."""
    store = place.store
    session, turns = await extend(store, await stored_session(store), 8)
    for number in range(1, 13):
        await store.patch_state(session.key, {"n": number}, T0 + 60_000 + number)
        kept = range(max(1, number - 4), number + 1)
        assert [fact.number for fact in await facts(store, session)] == list(kept)
    assert [entry for entry in await story(store, session) if isinstance(entry, Turn)] == turns
    store = await place.restart("boot-2")
    session = await store.move_head(await current(store, session), Back(1), T0 + 61_000)
    assert [fact.number for fact in await facts(store, session)] == [9, 10, 11, 12, 13]
    assert len(await story(store, session)) == 8 + life.event_limit


async def test_without_a_limit_all_facts_stay(place: Place) -> None:
    """Three hundred patches are three hundred facts, numbered without a gap, after a restart too."""
    session = await stored_session(place.store)
    # All at once they would wait for each other for as long as a store may take for one of them.
    for first in range(0, 300, 50):
        some = range(first, first + 50)
        await asyncio.gather(*(place.store.patch_state(session.key, {f"k{n}": n}, T0 + n) for n in some))
    store = await place.restart("boot-2")
    await store.patch_state(session.key, {"last": True}, T0)
    told = await facts(store, session)
    assert [fact.number for fact in told] == list(range(1, 302))
    assert {key for fact in told if isinstance(fact.fact, StateChanged) for key in fact.fact.patch} == {
        *(f"k{number}" for number in range(300)),
        "last",
    }


async def test_each_session_has_its_own_story(store: SessionStore) -> None:
    """Another session's entries are not in it; a deleted one's are nowhere, and numbers begin anew."""
    session, other = await stored_session(store), await stored_session(store, "s2")
    await make_story(store, session)
    assert await story(store, other) == []
    await store.patch_state(other.key, {"a": 1}, T0)
    await store.delete_session(session.key)
    assert await story(store, session) == []
    new = await stored_session(store)
    assert await story(store, new) == await story(store, session) == []
    await store.patch_state(new.key, {"b": 1}, T0)
    assert await story(store, new) == [LoggedFact(1, T0 + 1, StateChanged({"b": 1}))]
    assert await story(store, other) == [LoggedFact(1, T0 + 1, StateChanged({"a": 1}))]


async def test_a_turn_that_a_crash_interrupted_is_told(place: Place) -> None:
    """After the next start it is in its place, as failed."""
    session = await make_story(place.store, await stored_session(place.store))
    told = await story(await place.restart("boot-2"), session)
    assert len(told) == 12
    last = told[-1]
    assert isinstance(last, Turn)
    assert last.status is TurnStatus.FAILED
    assert last.error is not None
    assert last.error.code == "INTERRUPTED"
