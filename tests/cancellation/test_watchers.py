"""Watchers: a turn that ends with them waits for one to come back, and none is forgotten."""

import asyncio

import pytest

from app.domain.chat import OnDisconnect
from app.domain.errors import TurnCancelled
from app.domain.events import TurnCancelled as CancelledEvent
from app.domain.events import TurnFinished
from app.domain.turn import CancelReason
from app.services.turns import UNWATCHED_S, Flight, FlightState
from tests.cancellation.chats import KEY, Chats, end_of
from tests.cancellation.driver import cut_everywhere
from tests.cancellation.world import failure_of, start
from tests.fakes import Fault, Gate, Script
from tests.simulation.loop import settle, virtual

LONG = Script(deltas=("x",) * 10, pause_s=1.0)


async def unwatched(chats: Chats, **how) -> Flight:
    chats.scripts = [LONG]
    flight = await chats.begin(on_disconnect=OnDisconnect.CANCEL, **how)
    await flight.wait_started()
    await asyncio.sleep(1)
    return flight


@virtual
async def test_a_turn_ends_when_nobody_has_watched_it_for_two_seconds():
    """With ``on_disconnect=cancel`` the turn ends then, as ``disconnect``, and its text is kept."""
    chats = await Chats.make()
    flight = await unwatched(chats)
    left_at = asyncio.get_running_loop().time()
    flight.leave()
    ended = await end_of(flight)
    assert isinstance(ended, CancelledEvent)
    assert (ended.reason, ended.partial_kept) == (CancelReason.DISCONNECT, True)
    assert asyncio.get_running_loop().time() - left_at == pytest.approx(UNWATCHED_S)
    await chats.check_quiet()


@virtual
async def test_a_turn_goes_on_when_a_watcher_comes_back_in_time():
    """Who watches again within two seconds keeps the turn alive."""
    chats = await Chats.make()
    flight = await unwatched(chats)
    flight.leave()
    await asyncio.sleep(UNWATCHED_S - 0.1)
    assert await chats.chat.watch(KEY, flight.turn_id) is flight
    assert isinstance(await end_of(flight), TurnFinished)
    flight.leave()
    await chats.check_quiet()


@virtual
async def test_the_two_seconds_begin_anew_with_each_departure():
    """A watcher that was here a second ago counts, however long ago the one before had left."""
    chats = await Chats.make()
    flight = await unwatched(chats)
    flight.leave()
    await asyncio.sleep(1)
    flight.join()
    await asyncio.sleep(0.5)
    flight.leave()
    await asyncio.sleep(UNWATCHED_S - 0.1)
    assert flight.cancel_reason is None
    flight.join()
    assert isinstance(await end_of(flight), TurnFinished)
    await chats.check_quiet()


@virtual
async def test_an_ordinary_turn_goes_on_unwatched():
    """Without ``on_disconnect=cancel`` a running turn does not notice that its client has left."""
    chats = await Chats.make()
    chats.scripts = [LONG]
    flight = await chats.begin()
    await flight.wait_started()
    flight.leave()
    assert isinstance(await end_of(flight), TurnFinished)
    await chats.check_quiet()


@virtual
async def test_a_watcher_of_a_waiting_turn_keeps_it():
    """A turn that waits is dropped with its last watcher, whoever that is."""
    chats = await Chats.make()
    chats.scripts = [LONG]
    await (await chats.begin("first")).wait_started()
    waiting = await chats.begin("waiting")
    watching = start(chats.chat.watch(KEY, waiting.turn_id))
    await settle()
    waiting.leave()
    await settle()
    assert waiting.state is FlightState.ACCEPTED
    watching.cancel()
    await failure_of(watching)
    assert isinstance(await end_of(waiting), TurnCancelled)
    await chats.check_quiet()


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_watcher_may_be_cut_at_every_await(is_waiting):
    """However a watcher leaves, the turn counts the others right: it ends when the last has gone."""

    async def scene(victim):
        chats = await Chats.make()
        chats.store.fault_for = lambda _: Fault(delay_s=0.1)
        if is_waiting:
            chats.scripts = [Script(pause_s=1.0)]
            await (await chats.begin("first")).wait_started()
        flight = await chats.begin("watched", on_disconnect=OnDisconnect.CANCEL)
        chats.scripts.append(LONG)

        async def watch():
            watched = await chats.chat.watch(KEY, flight.turn_id)
            assert isinstance(watched, Flight)
            try:
                await watched.wait_ended()
            finally:
                watched.leave()

        was_cut = await victim(watch())
        if was_cut and flight.state is not FlightState.ENDED:
            assert flight._watchers == 1
            await flight.wait_started()
            flight.leave()
            assert isinstance(await end_of(flight), CancelledEvent)
        else:
            assert isinstance(await end_of(flight), TurnFinished)
        await chats.check_quiet()

    assert cut_everywhere(scene) >= 3


@virtual
async def test_a_turn_that_boards_is_not_dropped_with_its_client():
    """It has the session already, so it goes on; with ``on_disconnect=cancel`` it ends in time."""
    chats, late = await Chats.make(), Gate()
    chats.store.plan("start_turn", Fault(late_gate=late))
    flight = await chats.begin()
    await settle()
    assert flight.state is FlightState.BOARDING
    flight.leave()
    late.open()
    assert isinstance(await end_of(flight), TurnFinished)
    chats.store.plan("start_turn", Fault(late_gate=Gate()))
    ending = await chats.begin(on_disconnect=OnDisconnect.CANCEL)
    await settle()
    ending.leave()
    assert isinstance(await end_of(ending), TurnCancelled)
    await chats.check_quiet()
