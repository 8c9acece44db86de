"""A turn may be left, cancelled or stopped at every moment: what is told is what is stored."""

import asyncio

import pytest

from app.domain.errors import StoreUnavailable
from app.domain.events import TextDelta, TurnCancelled, TurnFailed, TurnFinished
from app.domain.turn import CancelReason
from tests.cancellation.chats import Chats, end_of, open_after
from tests.cancellation.driver import cut_everywhere
from tests.cancellation.world import start
from tests.fakes import Fault, Gate, Script
from tests.simulation.loop import run, settle, virtual

UNKNOWN = StoreUnavailable(outcome_unknown=True)
DOWN = StoreUnavailable()


def test_a_client_may_leave_at_every_await():
    """Whenever the client of a turn goes, the turn ends properly, and the next one sees what is stored."""

    async def scene(victim):
        chats = await Chats.make()
        chats.store.fault_for = lambda _: Fault(delay_s=0.1, late_delay_s=0.1)
        before = await chats.begin("before")
        was_cut = await victim(chats.chat.chat("a", "victim"))
        await end_of(before)
        await asyncio.sleep(10)
        inputs = [turn.input for turn in chats.path()]
        assert inputs in ([["before", "victim"]] if not was_cut else [["before"], ["before", "victim"]])
        await chats.check_quiet()

    assert cut_everywhere(scene) >= 4


def test_a_reader_may_leave_at_every_await():
    """Whenever the reader of a stream goes, the turn ends properly."""

    async def scene(victim):
        chats = await Chats.make()
        chats.store.fault_for = lambda _: Fault(delay_s=0.1)
        chats.scripts = [Script(deltas=("a", "b", "c"), pause_s=0.1)]
        seen = []

        async def read():
            async for event in chats.chat.stream("a", "victim"):
                seen.append(event)

        was_cut = await victim(read())
        assert was_cut or isinstance(seen[-1], TurnFinished)
        await asyncio.sleep(10)
        await chats.check_quiet()

    assert cut_everywhere(scene) >= 6


@pytest.mark.parametrize("keep_partial", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_a_turn_may_be_cancelled_at_every_moment(warm, keep_partial):
    """Whenever a turn is cancelled, it ends once, in proper form, and as the store has it."""

    async def scene(after_s: float) -> bool:
        chats = await Chats.make()
        if warm:
            await chats.chat.chat("a", "before")
        chats.store.fault_for = lambda _: Fault(delay_s=0.1, late_delay_s=0.1)
        chats.scripts = [Script(deltas=("a", "b", "c"), pause_s=0.1)]
        flight = await chats.begin()
        asyncio.get_running_loop().call_later(
            after_s, lambda: flight.cancel(CancelReason.USER, keep_partial=keep_partial)
        )
        await end_of(flight)
        chats.check_told(flight)
        was_early = isinstance(flight.log.terminal, TurnCancelled) or flight.refusal is not None
        await chats.check_quiet()
        return was_early

    cancelled = [run(scene(step * 0.05 + offset)) for step in range(40) for offset in (0, 0.01)]
    assert cancelled[0]
    assert not cancelled[-1]


@pytest.mark.parametrize("kept", [True, False])
def test_the_process_may_stop_at_every_moment(kept):
    """Whenever the server stops, no client was told what the store does not have, or has unannounced."""

    async def scene(after_s: float) -> None:
        chats = await Chats.make()
        chats.store.fault_for = lambda _: Fault(delay_s=0.1, late_delay_s=0.1)
        chats.scripts = [Script(deltas=("a", "b", "c"), pause_s=0.1)]
        flight = await chats.begin()
        await asyncio.sleep(after_s)
        chats.pool.begin_drain()
        if kept:
            flight.cancel(CancelReason.DRAIN, keep_partial=True)
            await asyncio.sleep(3)
        await chats.conductor.close()
        await chats.pool.close()
        await end_of(flight)
        chats.check_told(flight)
        assert len(chats.turns) == len(chats.conductor._tasks) == chats.pool.live_count() == 0

    for step in range(40):
        run(scene(step * 0.05 + 0.01))


# -- the store in doubt


@pytest.mark.parametrize("applied", [True, False])
@virtual
async def test_a_commit_in_doubt_is_repeated_until_it_is_known(applied):
    """A commit whose outcome is unknown is repeated, and stored once."""
    chats = await Chats.make()
    fault = Fault(late_error=UNKNOWN) if applied else Fault(error=UNKNOWN)
    chats.store.plan("commit_turn", fault, fault, fault)
    flight = await chats.begin()
    assert isinstance(await end_of(flight), TurnFinished)
    assert [turn.turn_id for turn in chats.path()] == [flight.turn_id]
    await chats.check_quiet()


@virtual
async def test_a_commit_in_doubt_stays_in_doubt_when_the_store_goes_down():
    """A commit that may have happened is not called failed because a later attempt did not get through."""
    chats = await Chats.make()
    chats.store.plan("commit_turn", Fault(late_error=UNKNOWN), Fault(error=DOWN))
    flight = await chats.begin()
    await end_of(flight)
    chats.check_told(flight)
    await chats.check_quiet()


@pytest.mark.parametrize("applied", [True, False])
@virtual
async def test_a_turn_whose_start_is_in_doubt_does_not_run_for_ever(applied):
    """A turn that is refused because its start record is in doubt is not listed as running."""
    chats = await Chats.make()
    chats.store.plan("start_turn", Fault(late_error=UNKNOWN) if applied else Fault(error=UNKNOWN))
    flight = await chats.begin()
    assert isinstance(await end_of(flight), StoreUnavailable)
    assert not chats.running()
    chats.check_told(flight)
    await chats.check_quiet()


@virtual
async def test_a_refusal_does_not_wait_for_a_store_that_hangs():
    """Whose start record is in doubt is refused at once; the record follows when the store answers."""
    chats = await Chats.make()
    chats.store.plan("start_turn", Fault(late_error=UNKNOWN))
    chats.store.plan("record_turn", Fault(delay_s=5.0, error=UNKNOWN), Fault(delay_s=5.0))
    began = asyncio.get_running_loop().time()
    flight = await chats.begin()
    assert isinstance(await end_of(flight), StoreUnavailable)
    assert asyncio.get_running_loop().time() - began < 0.3
    await asyncio.sleep(15.0)
    assert not chats.running()
    chats.check_told(flight)
    await chats.check_quiet()


@virtual
async def test_a_turn_that_is_cancelled_before_it_started_tells_no_events():
    """A cancel while the start record is being written refuses the turn: its log stays empty."""
    chats, late = await Chats.make(), Gate()
    chats.store.plan("start_turn", Fault(late_gate=late))
    flight = await chats.begin()
    await settle()
    assert flight.cancel(CancelReason.USER, keep_partial=True)
    await end_of(flight)
    chats.check_told(flight)
    await chats.check_quiet()


@virtual
async def test_a_zombie_is_let_go_only_when_the_store_has_its_turn():
    """The partial of a turn whose body hangs is stored before the next turn of the session begins."""
    chats = await Chats.make()
    chats.scripts = [Script(deltas=("a", "b"), pause_s=1.0, holdout=open_after(60))]
    first = await chats.begin("first")
    second = await chats.begin("second")
    await asyncio.sleep(0.5)
    chats.store.plan("commit_turn", Fault(delay_s=2.0))
    first.cancel(CancelReason.USER, keep_partial=True)
    ended = await end_of(first)
    assert isinstance(ended, TurnCancelled)
    assert ended.partial_kept
    assert chats.pool.stats().zombies == 1
    assert isinstance(await end_of(second), TurnFinished)
    assert [turn.input for turn in chats.path()] == ["first", "second"]
    await chats.check_quiet()


@virtual
async def test_a_commit_cut_off_by_the_stop_is_in_doubt():
    """When the server stops in the middle of a commit, the client is told that its outcome is unknown."""
    chats = await Chats.make()
    chats.store.plan("commit_turn", Fault(late_delay_s=100.0))
    flight = await chats.begin()
    await asyncio.sleep(1)
    closing = start(chats.conductor.close())
    ended = await end_of(flight)
    await closing
    assert isinstance(ended, TurnFailed)
    assert ended.error.outcome_unknown
    assert [turn.turn_id for turn in chats.path()] == [flight.turn_id]
    await chats.pool.close()


@virtual
async def test_a_failed_record_is_written_when_the_store_is_back():
    """A failed turn that the store could not take is recorded later, and the session goes on meanwhile."""
    chats = await Chats.make()
    chats.scripts = [Script(error=ValueError("a bug"))]
    chats.store.plan("record_turn", *[Fault(error=DOWN)] * 3)
    flight = await chats.begin("bad")
    assert isinstance(await end_of(flight), TurnFailed)
    assert chats.running()
    await chats.chat.chat("a", "good")
    assert [turn.input for turn in chats.path()] == ["good"]
    await chats.check_quiet()


@virtual
async def test_a_late_delta_of_a_zombie_is_not_heard():
    """What a body says after its turn has ended is in no log and in no path."""
    chats = await Chats.make()
    chats.scripts = [Script(deltas=("a", "b"), pause_s=1.0, holdout=open_after(30))]
    flight = await chats.begin()
    await asyncio.sleep(0.5)
    flight.cancel(CancelReason.USER, keep_partial=True)
    await end_of(flight)
    heard = len(flight.log.events)
    flight.emit(TextDelta("late"))
    await asyncio.sleep(60)
    assert len(flight.log.events) == heard
    assert chats.pool.stats().zombies == 0
    await chats.check_quiet()
