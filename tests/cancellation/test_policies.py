"""Who gets the session when several turns want it: interrupts, rollbacks, deletes, sticky choices."""

import asyncio

import pytest

from app.domain.chat import OnBusy
from app.domain.errors import (
    SessionArchived,
    SessionBusy,
    SessionNotFound,
    TurnCancelled,
    TurnQueueFull,
    UnknownModel,
)
from app.domain.events import TurnCancelled as CancelledEvent
from app.domain.events import TurnFinished
from app.domain.session import SessionChange, SessionStatus
from app.domain.turn import CancelReason
from app.services.turns import FlightState
from tests.cancellation.chats import KEY, Chats, end_of, open_after
from tests.cancellation.driver import cut_everywhere
from tests.cancellation.world import failure_of, start
from tests.fakes import Fault, Gate, Script, make_session
from tests.simulation.loop import run, settle, virtual

SLOW = Script(deltas=("so ", "far"), pause_s=5.0)
INTERRUPTING = [OnBusy.INTERRUPT, OnBusy.ROLLBACK]


async def running(chats: Chats, script: Script = SLOW, message: str = "running"):
    """Return a turn that has said something and has more to say."""
    chats.scripts.insert(0, script)
    flight = await chats.begin(message)
    await flight.wait_started()
    await asyncio.sleep(1)
    return flight


@pytest.mark.parametrize("on_busy", INTERRUPTING)
@virtual
async def test_an_interrupter_is_next_and_those_who_wait_follow(on_busy):
    """It ends the running turn, keeps or drops its text, and goes before the waiting ones, which stay."""
    chats = await Chats.make()
    first = await running(chats)
    waiting = [await chats.begin(f"waiting {number}") for number in range(2)]
    await settle()
    urgent = await chats.begin("urgent", on_busy=on_busy)
    ended = await end_of(first)
    kept = on_busy is OnBusy.INTERRUPT
    assert isinstance(ended, CancelledEvent)
    assert (ended.reason, ended.partial_kept) == (CancelReason(on_busy), kept)
    for flight in (urgent, *waiting):
        assert isinstance(await end_of(flight), TurnFinished)
    assert [turn.input for turn in chats.path()] == [
        *(["running"] if kept else []), "urgent", "waiting 0", "waiting 1"
    ]  # fmt: skip
    await chats.check_quiet()


@pytest.mark.parametrize("on_busy", INTERRUPTING)
@virtual
async def test_a_turn_that_commits_has_won(on_busy):
    """An interrupter that comes while the running turn is being stored waits for it."""
    chats, late = await Chats.make(), Gate()
    chats.store.plan("commit_turn", Fault(gate=late))
    first = await chats.begin("first")
    await settle()
    assert first.state is FlightState.COMMITTING
    urgent = await chats.begin("urgent", on_busy=on_busy)
    await asyncio.sleep(5)
    assert urgent.state is FlightState.ACCEPTED
    late.open()
    assert isinstance(await end_of(first), TurnFinished)
    assert isinstance(await end_of(urgent), TurnFinished)
    assert [turn.input for turn in chats.path()] == ["first", "urgent"]
    await chats.check_quiet()


@virtual
async def test_of_two_interrupters_neither_is_lost():
    """The second goes before the first, which waits and runs after it; the running turn ends once."""
    chats = await Chats.make()
    first = await running(chats)
    urgent = [await chats.begin(f"urgent {n}", on_busy=OnBusy.INTERRUPT) for n in range(2)]
    ended = await end_of(first)
    assert isinstance(ended, CancelledEvent)
    for flight in urgent:
        assert isinstance(await end_of(flight), TurnFinished)
    assert [turn.input for turn in chats.path()] == ["running", "urgent 1", "urgent 0"]
    await chats.check_quiet()


@virtual
async def test_an_interrupter_whose_client_leaves():
    """The running turn has ended all the same, and those who wait go on without the interrupter."""
    chats = await Chats.make()
    first = await running(chats, Script(deltas=("a", "b"), pause_s=5.0, holdout=open_after(4)))
    waiting = await chats.begin("waiting")
    await settle()
    urgent = await chats.begin("urgent", on_busy=OnBusy.INTERRUPT)
    await settle()
    urgent.leave()
    assert isinstance(await end_of(urgent), TurnCancelled)
    assert isinstance(await end_of(first), CancelledEvent)
    assert isinstance(await end_of(waiting), TurnFinished)
    assert [turn.input for turn in chats.path()] == ["running", "waiting"]
    await chats.check_quiet()


@virtual
async def test_a_turn_that_waits_for_its_load_is_not_the_running_one():
    """An interrupter that comes during a load goes before the turn that caused it, which stays."""
    chats, load = await Chats.make(), Gate()
    chats.store.plan("load_path", Fault(gate=load))
    first = await chats.begin("first")
    await settle()
    urgent = await chats.begin("urgent", on_busy=OnBusy.INTERRUPT)
    await settle()
    load.open()
    assert isinstance(await end_of(urgent), TurnFinished)
    assert isinstance(await end_of(first), TurnFinished)
    assert [turn.input for turn in chats.path()] == ["urgent", "first"]
    await chats.check_quiet()


@virtual
async def test_a_turn_that_boards_is_interrupted():
    """A turn that has the lease and no event yet is refused as cancelled and leaves no trace."""
    chats, late = await Chats.make(), Gate()
    chats.store.plan("start_turn", Fault(late_gate=late))
    first = await chats.begin("first")
    await settle()
    assert first.state is FlightState.BOARDING
    urgent = await chats.begin("urgent", on_busy=OnBusy.INTERRUPT)
    assert isinstance(await end_of(first), TurnCancelled)
    assert isinstance(await end_of(urgent), TurnFinished)
    assert [turn.input for turn in chats.path()] == ["urgent"]
    await chats.check_quiet()


@virtual
async def test_an_interrupter_waits_for_a_hold():
    """Who holds a session without a turn is not interrupted, only waited for."""
    chats, gate = await Chats.make(), Gate()

    async def hold() -> None:
        async with chats.pool.hold(KEY):
            await gate.wait()

    holding = start(hold())
    await settle()
    waiting = await chats.begin("waiting")
    urgent = await chats.begin("urgent", on_busy=OnBusy.INTERRUPT)
    await asyncio.sleep(5)
    assert urgent.state is FlightState.ACCEPTED
    gate.open()
    await holding
    assert isinstance(await end_of(urgent), TurnFinished)
    assert isinstance(await end_of(waiting), TurnFinished)
    assert [turn.input for turn in chats.path()] == ["urgent", "waiting"]
    await chats.check_quiet()


@virtual
async def test_an_interrupter_enters_a_full_queue_and_a_refused_one_interrupts_nobody():
    """The front has places of its own; when they are taken, too, the running turn does not notice."""
    chats = await Chats.make(queue_depth=1)
    first = await running(chats, Script(deltas=("a", "b"), pause_s=8.0, holdout=open_after(7)))
    waiting = await chats.begin("waiting")
    assert isinstance(await end_of(await chats.begin("too many")), TurnQueueFull)
    urgent = [await chats.begin(f"urgent {n}", on_busy=OnBusy.INTERRUPT) for n in range(2)]
    await settle()
    refused = await chats.begin("urgent 2", on_busy=OnBusy.ROLLBACK)
    assert isinstance(await end_of(refused), TurnQueueFull)
    ended = await end_of(first)
    assert isinstance(ended, CancelledEvent)
    assert ended.partial_kept
    for flight in (*urgent, waiting):
        assert isinstance(await end_of(flight), TurnFinished)
    await chats.check_quiet()


@pytest.mark.parametrize("on_busy", INTERRUPTING)
def test_an_interrupt_may_come_at_every_moment(on_busy):
    """Whenever it comes, both turns end as the store has them, and the interrupter runs."""

    async def scene(after_s: float) -> None:
        chats = await Chats.make()
        chats.store.fault_for = lambda _: Fault(delay_s=0.1, late_delay_s=0.1)
        chats.scripts = [Script(deltas=("a", "b", "c"), pause_s=0.1)]
        first = await chats.begin("first")
        await asyncio.sleep(after_s)
        urgent = await chats.begin("urgent", on_busy=on_busy)
        assert isinstance(await end_of(urgent), TurnFinished)
        await end_of(first)
        chats.check_told(first)
        chats.check_told(urgent)
        await chats.check_quiet()

    for step in range(40):
        run(scene(step * 0.05))
        run(scene(step * 0.05 + 0.01))


@pytest.mark.parametrize("on_busy", INTERRUPTING)
def test_the_client_of_an_interrupter_may_leave_at_every_await(on_busy):
    """Whenever it leaves, nobody waits for ever, and the next turn sees what is stored."""

    async def scene(victim):
        chats = await Chats.make()
        chats.store.fault_for = lambda _: Fault(delay_s=0.1, late_delay_s=0.1)
        chats.scripts = [Script(deltas=("a", "b", "c"), pause_s=0.1)]
        first = await chats.begin("first")
        await first.wait_started()
        waiting = await chats.begin("waiting")
        was_cut = await victim(chats.chat.chat("a", "urgent", on_busy=on_busy))
        await end_of(first)
        assert isinstance(await end_of(waiting), TurnFinished)
        await asyncio.sleep(10)
        chats.check_told(first)
        inputs = [turn.input for turn in chats.path()]
        assert inputs[-1] == "waiting"
        assert was_cut or "urgent" in inputs
        await chats.check_quiet()

    assert cut_everywhere(scene) >= 4


@virtual
async def test_a_turn_that_is_overtaken_does_not_wait_without_end():
    """The bound on a turn's wait holds for one that was first in line for a load, and then overtaken."""
    chats, load = await Chats.make(queue_wait_s=2.0), Gate()
    chats.store.plan("load_path", Fault(gate=load))
    first = await chats.begin("first")
    await asyncio.sleep(3)
    chats.scripts = [Script(deltas=("x",) * 3, pause_s=5.0)]
    urgent = await chats.begin("urgent", on_busy=OnBusy.INTERRUPT)
    load.open()
    await urgent.wait_started()
    started = asyncio.get_running_loop().time()
    assert isinstance(await end_of(first), TurnQueueFull)
    assert asyncio.get_running_loop().time() - started <= 2.0
    await end_of(urgent)
    await chats.check_quiet()


# -- deletes


@virtual
async def test_an_interrupter_does_not_overtake_a_delete():
    """A turn that comes after a delete has begun finds no session, however urgent it is."""
    chats = await Chats.make()
    await running(chats, Script(deltas=("a", "b"), pause_s=5.0, holdout=open_after(3)))
    deleting = start(chats.sessions.delete(KEY))
    await settle()
    urgent = await chats.begin("urgent", on_busy=OnBusy.INTERRUPT)
    assert isinstance(await end_of(urgent), SessionNotFound)
    await deleting
    assert KEY not in chats.store.inner._records
    await asyncio.sleep(5)


@virtual
async def test_who_waited_for_a_deleted_session_does_not_get_its_successor():
    """Made again under the same id while they wait, the session refuses the old ones and is untouched."""
    chats = await Chats.make()
    first = await running(chats)
    waiting = [await chats.begin(f"waiting {n}") for n in range(3)]
    await settle()
    # Behind the services' back, as another process would.
    await chats.store.inner.delete_session(KEY)
    await chats.store.inner.create_session(make_session("a", uid="0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"))
    new = await chats.begin("new")
    await end_of(first)
    for flight in waiting:
        assert isinstance(await end_of(flight), SessionNotFound)
    assert isinstance(await end_of(new), TurnFinished)
    assert [turn.input for turn in chats.path()] == ["new"]
    await chats.check_quiet()


@virtual
async def test_a_delete_waits_for_the_end_of_the_turn_it_cancelled():
    """However short the turns' own wait is: the turn is over soon, and then the session is gone."""
    chats = await Chats.make(queue_wait_s=0.5)
    first = await running(chats, Script(deltas=("a", "b"), pause_s=5.0, holdout=open_after(8)))
    await chats.sessions.delete(KEY)
    assert isinstance(await end_of(first), CancelledEvent)
    assert KEY not in chats.store.inner._records
    await asyncio.sleep(10)


def test_a_delete_may_be_cut_at_every_await():
    """A delete whose caller leaves has happened or not; nobody waits for ever."""

    async def scene(victim):
        chats = await Chats.make()
        chats.store.fault_for = lambda _: Fault(delay_s=0.1, late_delay_s=0.1)
        first = await running(chats, Script(deltas=("a", "b", "c"), pause_s=0.5))
        waiting = await chats.begin("waiting")
        was_cut = await victim(chats.sessions.delete(KEY))
        ends = [await end_of(flight) for flight in (first, waiting)]
        if KEY in chats.store.inner._records:
            assert was_cut
            await chats.check_quiet()
        else:
            assert isinstance(ends[0], CancelledEvent)
            assert isinstance(ends[1], SessionNotFound)

    assert cut_everywhere(scene) >= 3


# -- what the record says when a turn starts


@virtual
async def test_archiving_lets_the_running_turn_end_and_refuses_the_others():
    """Those that wait when a session is archived are refused in their turn."""
    chats = await Chats.make()
    first = await running(chats)
    waiting = [await chats.begin("waiting") for _ in range(2)]
    await chats.sessions.update(KEY, SessionChange(status=SessionStatus.ARCHIVED))
    assert isinstance(await end_of(first), TurnFinished)
    assert [type(await end_of(flight)) for flight in waiting] == [SessionArchived] * 2
    await chats.sessions.update(KEY, SessionChange(status=SessionStatus.ACTIVE))
    await chats.check_quiet()


@virtual
async def test_choices_count_from_the_record_as_it_is_when_the_turn_starts():
    """A choice that the session had when the turn came, and has no more when it starts, is made again."""
    chats = await Chats.make()
    await chats.chat.chat("a", "first", params={"temperature": 0.1})
    await running(chats)
    second = await chats.begin("second", params={"temperature": 0.5, "top_p": 0.5})
    third = await chats.begin("third", params={"temperature": 0.1})
    for flight in (second, third):
        assert isinstance(await end_of(flight), TurnFinished)
    assert chats.store.inner._records[KEY].session.params == {"temperature": 0.1}
    await chats.check_quiet()


@virtual
async def test_a_choice_that_does_not_fit_any_more_is_not_stored():
    """A model that the provider chosen meanwhile does not offer refuses the turn and changes nothing."""
    chats = await Chats.make()
    chats.factory.models |= {("fake", "other"), ("second", "echo")}
    await running(chats)
    provider = await chats.begin("provider", provider="second")
    model = await chats.begin("model", model="other")
    assert isinstance(await end_of(provider), TurnFinished)
    assert isinstance(await end_of(model), UnknownModel)
    session = chats.store.inner._records[KEY].session
    assert (session.provider, session.model) == ("second", None)
    await chats.check_quiet()


# -- the operator


@virtual
async def test_forcing_out_an_agent_whose_turn_boards():
    """A turn that has the lease is ended even if it has not started, and those who wait go on."""
    chats, late = await Chats.make(), Gate()
    chats.store.plan("start_turn", Fault(late_gate=late))
    first, waiting = await chats.begin("first"), await chats.begin("waiting")
    await settle()
    refused = await failure_of(chats.admin.evict(KEY))
    assert isinstance(refused, SessionBusy)
    assert refused.turn_id == first.turn_id
    await chats.admin.evict(KEY, force=True)
    assert isinstance(await end_of(first), TurnCancelled)
    assert isinstance(await end_of(waiting), TurnFinished)
    await chats.check_quiet()


@virtual
async def test_an_agent_that_is_leased_without_a_turn_cannot_be_forced_out():
    """There is no turn to cancel, so the operator is told that it is in use."""
    chats = await Chats.make()
    lease = await chats.pool.acquire(KEY)
    assert isinstance(await failure_of(chats.admin.evict(KEY, force=True)), SessionBusy)
    lease.give_back()
    await chats.admin.evict(KEY)
    await chats.check_quiet()


@virtual
async def test_forcing_out_an_agent_whose_turn_commits():
    """The turn has won and is finished; its agent is gone as was asked."""
    chats, late = await Chats.make(), Gate()
    chats.store.plan("commit_turn", Fault(gate=late))
    first = await chats.begin("first")
    await settle()
    forcing = start(chats.admin.evict(KEY, force=True))
    await settle()
    late.open()
    await forcing
    assert isinstance(await end_of(first), TurnFinished)
    assert not chats.pool.is_live(KEY)
    await chats.check_quiet()
