"""A user's cap while turns come and go: who is spared between being listed and being evicted."""

import asyncio

import pytest

from app.domain.errors import SessionBusy, SessionLimit, SessionNotFound
from app.domain.events import TurnFinished
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan
from app.services.admission import Admission, NewSession
from tests.cancellation.chats import Chats, end_of
from tests.fakes import FakeClock, Fault, Gate, LoopClock, Script, make_session, new_ids

ALICE = NewSession(user_id="alice")


async def make_world(*session_ids: str, cap: int) -> tuple[Chats, Admission]:
    """Return a world in which alice has these sessions, the first the oldest, and may have ``cap``."""
    chats = await Chats.make()
    for number, name in enumerate(session_ids):
        session = make_session(name, user_id="alice", last_accessed=number)
        await chats.store.inner.create_session(session)
    admission = Admission(
        chats.store,
        chats.factory,
        LoopClock(),
        new_ids(1000),
        LifeSpan(),
        max_per_user=cap,
        pool=chats.pool,
        turns=chats.turns,
    )
    return chats, admission


async def waits_at(gate: Gate) -> None:
    while not gate.waiting:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def left(chats: Chats) -> set[str]:
    keys = await chats.store.inner.list_keys("", user_id="alice", limit=99)
    return {key.session_id for key in keys}


async def test_a_turn_that_comes_after_the_listing_spares_its_session() -> None:
    """The oldest was chosen, then a turn began there: the next oldest goes instead."""
    chats, admission = await make_world("s1", "s2", cap=2)
    gate, busy = Gate(), Gate()
    chats.store.plan("list_oldest", Fault(late_gate=gate))
    creating = asyncio.ensure_future(admission.create(ALICE))
    await waits_at(gate)
    chats.scripts.append(Script(gate=busy))
    flight = await chats.begin(session_id="s1")
    await flight.wait_started()
    gate.open()
    made = await creating
    assert await left(chats) == {"s1", made.key.session_id}
    busy.open()
    assert isinstance(await end_of(flight), TurnFinished)


async def test_a_session_that_was_active_since_the_listing_is_spared() -> None:
    """A whole turn fits in between: its session is not the oldest any more."""
    chats, admission = await make_world("s1", "s2", cap=2)
    gate = Gate()
    chats.store.plan("list_oldest", Fault(late_gate=gate))
    creating = asyncio.ensure_future(admission.create(ALICE))
    await waits_at(gate)
    await chats.chat.chat("s1", "hello")
    gate.open()
    made = await creating
    assert await left(chats) == {"s1", made.key.session_id}


async def test_a_turn_that_comes_during_the_eviction_waits_and_finds_no_session() -> None:
    """It never runs in a session that is being deleted."""
    chats, admission = await make_world("s1", cap=1)
    await chats.chat.chat("s1", "hello")
    assert chats.pool.is_live(SessionKey("", "s1"))
    gate = Gate()
    chats.store.plan("create_sessions", Fault(gate=gate))
    creating = asyncio.ensure_future(admission.create(ALICE))
    await waits_at(gate)
    flight = await chats.begin(session_id="s1")
    gate.open()
    made = await creating
    assert isinstance(await end_of(flight), SessionNotFound)
    assert await left(chats) == {made.key.session_id}
    assert not chats.pool.is_live(SessionKey("", "s1"))


async def test_a_caller_that_leaves_frees_line_and_victim() -> None:
    """Cancelled while the store is asked, it holds up neither the next creation nor a turn."""
    chats, admission = await make_world("s1", cap=1)
    gate = Gate()
    chats.store.plan("create_sessions", Fault(gate=gate))
    creating = asyncio.ensure_future(admission.create(ALICE))
    await waits_at(gate)
    creating.cancel()
    await asyncio.gather(creating, return_exceptions=True)
    assert isinstance(await end_of(await chats.begin(session_id="s1")), TurnFinished)
    made = await admission.create(ALICE)
    assert await left(chats) == {made.key.session_id}
    assert not admission._lines


async def test_when_every_session_has_a_turn_the_new_one_is_refused() -> None:
    """Nothing is evicted and nothing made."""
    chats, admission = await make_world("s1", cap=1)
    busy = Gate()
    chats.scripts.append(Script(gate=busy))
    flight = await chats.begin(session_id="s1")
    await flight.wait_started()
    refusal = (await admission.create_many([ALICE]))[0]
    assert isinstance(refusal, SessionLimit)
    assert await left(chats) == {"s1"}
    busy.open()
    assert isinstance(await end_of(flight), TurnFinished)


async def test_who_is_being_erased_is_barred_for_a_while_at_most() -> None:
    """A process that hears nothing more of an erasure believes in its end; others' sessions are made."""
    chats, clock = await Chats.make(), FakeClock()
    admission = Admission(chats.store, chats.factory, clock, new_ids(1000), LifeSpan())
    admission.bar(("", "alice"), 10)
    with pytest.raises(SessionBusy):
        await admission.create(ALICE)
    await admission.create(NewSession(user_id="bob"))
    await admission.create(NewSession())
    clock.advance(10)
    await admission.create(ALICE)
    admission.bar(("", "alice"), 10)
    admission.bar(("", "alice"), 0)
    await admission.create(ALICE)
