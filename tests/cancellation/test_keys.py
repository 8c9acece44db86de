"""Idempotency keys while turns are in flight: one turn per key, whatever happens in which order."""

import asyncio

import pytest

from app.domain.chat import OnBusy, PastTurn
from app.domain.errors import (
    IdempotencyMismatch,
    ModelError,
    SessionBusy,
    SessionNotFound,
    StoreUnavailable,
    TurnCancelled,
)
from app.domain.events import TurnFailed, TurnFinished
from app.domain.turn import CancelReason
from tests.cancellation.chats import KEY, Chats, end_of, open_after
from tests.cancellation.driver import cut_everywhere
from tests.cancellation.world import failure_of, start
from tests.fakes import Fault, Gate, Script
from tests.simulation.loop import run, settle, virtual

HOW = {"idempotency_key": "k"}
SLOW = Script(deltas=("so ", "far"), pause_s=5.0)


def inputs(chats: Chats) -> list[str]:
    return [turn.input for turn in chats.path()]


@virtual
async def test_twenty_at_once_are_one_turn():
    """Equal requests that come together, and one that comes later, get one turn and equal answers."""
    chats = await Chats.make()
    chats.store.fault_for = lambda _: Fault(delay_s=0.1)
    calls = [start(chats.chat.chat(None, "hello", **HOW)) for _ in range(20)]
    answers = [await call for call in calls]
    answers.append(await chats.chat.chat(None, "hello", **HOW))
    assert all(answer == answers[0] for answer in answers)
    assert len(chats.factory.built) == 1
    assert len(chats.store.inner._records) == 2
    assert not chats.turns._claims


@virtual
async def test_another_request_with_the_key_is_refused():
    """While the turn runs and when it has ended; what is not compared makes no difference."""
    chats = await Chats.make()
    chats.scripts = [SLOW]
    flight = await chats.begin(**HOW)
    for other in (
        {"message": "other"},
        {"session_id": None},
        {"params": {"seed": 1}},
        {"metadata": {"a": 1}},
    ):
        assert isinstance(await failure_of(chats.ask(**HOW, **other)), IdempotencyMismatch)
    assert await chats.begin(**HOW, on_busy=OnBusy.REJECT, user_id=None) is flight
    await end_of(flight)
    for other in ({"message": "other"}, {"model": "echo"}):
        assert isinstance(await failure_of(chats.ask(**HOW, **other)), IdempotencyMismatch)
    past = await chats.ask(**HOW, on_busy=OnBusy.INTERRUPT)
    assert isinstance(past, PastTurn)
    assert past.turn.turn_id == flight.turn_id


@virtual
async def test_another_owners_key_is_another_key():
    """Two owners may use the same key for different requests at the same time."""
    chats = await Chats.make()
    flights = [await chats.begin(f"of {owner}", owner=owner, **HOW) for owner in ("ann", "bob")]
    for flight in flights:
        assert isinstance(await end_of(flight), TurnFinished)
    assert flights[0].turn_id != flights[1].turn_id
    again = await chats.ask("of bob", owner="bob", **HOW)
    assert isinstance(again, PastTurn)
    assert again.turn.turn_id == flights[1].turn_id


@virtual
async def test_a_failed_turn_gives_its_key_back_at_once():
    """Whoever has read of the failure may ask again in the same breath, and a new turn runs."""
    chats = await Chats.make()
    chats.scripts = [Script(error=ModelError())]
    failure = await failure_of(chats.chat.chat("a", "hello", **HOW))
    assert failure is not None
    answer = await chats.chat.chat("a", "hello", **HOW)
    assert answer.turn_count == 1
    await chats.check_quiet()


@virtual
async def test_a_refused_turn_gives_its_key_back_at_once():
    """A turn that was refused before it started does not answer the next request with its key."""
    chats = await Chats.make()
    chats.scripts = [SLOW]
    first = await chats.begin("first")
    await first.wait_started()
    refused = await failure_of(chats.chat.chat("a", "hello", on_busy=OnBusy.REJECT, **HOW))
    assert isinstance(refused, SessionBusy)
    answer = await chats.chat.chat("a", "hello", **HOW)
    assert answer.turn_count == 2
    assert isinstance(await failure_of(chats.ask("other", **HOW)), IdempotencyMismatch)
    await chats.check_quiet()


@virtual
async def test_a_refusal_before_acceptance_binds_nothing():
    """Those who waited for the first request are tried themselves, another request, too."""
    chats = await Chats.make()
    chats.store.plan("ensure_session", Fault(delay_s=1.0, error=StoreUnavailable()))
    first = start(chats.ask("hello", **HOW))
    await settle()
    other = start(chats.ask("other", **HOW))
    await settle()
    same = start(chats.ask("other", **HOW))
    assert isinstance(await failure_of(first), StoreUnavailable)
    assert (await other) is (await same)
    assert isinstance(await end_of(await other), TurnFinished)
    assert inputs(chats) == ["other"]
    await chats.check_quiet()


@pytest.mark.parametrize("message", ["hello", "other"])
@virtual
async def test_the_first_may_leave_while_it_looks_up_the_store(message):
    """A first request that is cancelled before its turn is accepted leaves the key to the next one."""
    chats = await Chats.make()
    chats.store.plan("find_bound", Fault(gate=Gate()))
    first = start(chats.ask("hello", **HOW))
    await settle()
    second = start(chats.ask(message, **HOW))
    await settle()
    first.cancel()
    await failure_of(first)
    assert isinstance(await end_of(await second), TurnFinished)
    assert inputs(chats) == [message]
    await chats.check_quiet()


@virtual
async def test_a_repeat_keeps_a_waiting_turn_alive():
    """A turn that waits is dropped when its last client leaves, not when the first of two does."""
    chats = await Chats.make()
    chats.scripts = [SLOW]
    await (await chats.begin("first")).wait_started()
    original, repeat = await chats.begin(**HOW), await chats.begin(**HOW)
    assert original is repeat
    original.leave()
    await settle()
    assert isinstance(await end_of(repeat), TurnFinished)
    await chats.check_quiet()


@virtual
async def test_a_repeat_does_not_join_a_turn_that_is_being_dropped():
    """A client that lost its connection and asks again in the same tick gets a turn that runs."""
    chats = await Chats.make()
    chats.scripts = [SLOW]
    await (await chats.begin("first")).wait_started()
    original = await chats.begin(**HOW)
    await settle()
    original.leave()
    repeat = await chats.begin(**HOW)
    assert repeat is not original
    assert isinstance(await end_of(repeat), TurnFinished)
    assert isinstance(await end_of(original), TurnCancelled)
    assert inputs(chats) == ["first", "hello"]
    await chats.check_quiet()


@pytest.mark.parametrize("keep_partial", [True, False])
@virtual
async def test_a_cancelled_turn_keeps_its_key_if_it_was_kept(keep_partial):
    """Kept it is answered again as cancelled; dropped it gives the key back."""
    chats = await Chats.make()
    chats.scripts = [SLOW]
    flight = await chats.begin(**HOW)
    await asyncio.sleep(1)
    flight.cancel(CancelReason.USER, keep_partial=keep_partial)
    await end_of(flight)
    again = await failure_of(chats.chat.chat("a", "hello", **HOW))
    if keep_partial:
        assert isinstance(again, TurnCancelled)
        assert (again.session_id, again.turn_id) == ("a", flight.turn_id)
    else:
        assert again is None
    assert len(chats.path()) == 1
    await chats.check_quiet()


@virtual
async def test_deleting_the_session_frees_the_key():
    """With the session its keys are gone: the same request makes a new session and a new turn."""
    chats = await Chats.make()
    before = await chats.chat.chat("a", "hello", **HOW)
    await chats.sessions.delete(KEY)
    after = await chats.chat.chat("a", "hello", **HOW)
    assert before.turn_id != after.turn_id
    assert after.turn_count == 1
    await chats.check_quiet()


@virtual
async def test_a_repeat_during_a_delete():
    """A repeat that joined the turn learns what became of it; one that comes later begins anew."""
    chats = await Chats.make()
    chats.scripts = [Script(deltas=("a", "b"), pause_s=5.0, holdout=open_after(3))]
    flight = await chats.begin(**HOW)
    await flight.wait_started()
    deleting = start(chats.sessions.delete(KEY))
    await settle()
    repeat = start(failure_of(chats.chat.chat("a", "hello", **HOW)))
    await deleting
    assert isinstance(await repeat, TurnCancelled | SessionNotFound)
    assert (await chats.chat.chat("a", "hello", **HOW)).turn_count == 1
    await chats.check_quiet()


@pytest.mark.parametrize("applied", [True, False])
@virtual
async def test_a_commit_in_doubt_is_looked_up(applied):
    """After a turn whose commit is in doubt, a repeat finds it if it is stored and else runs it."""
    chats = await Chats.make()
    unknown = StoreUnavailable(outcome_unknown=True)
    first = Fault(late_error=unknown) if applied else Fault(error=unknown)
    chats.store.plan("commit_turn", first, *[Fault(error=unknown)] * 200)
    flight = await chats.begin(**HOW)
    assert isinstance(await end_of(flight), TurnFailed)
    chats.store._plans.clear()
    answer = await chats.chat.chat("a", "hello", **HOW)
    assert (answer.turn_id == flight.turn_id) == applied
    assert len(chats.path()) == 1
    await chats.check_quiet()


def test_a_repeat_may_come_at_every_moment():
    """Whenever the repeat comes, there is one turn, and both get the same answer."""

    async def scene(after_s: float) -> None:
        chats = await Chats.make()
        chats.store.fault_for = lambda _: Fault(delay_s=0.1, late_delay_s=0.1)
        chats.scripts = [Script(deltas=("a", "b", "c"), pause_s=0.1)]
        first = start(chats.chat.chat(None, "hello", **HOW))
        await asyncio.sleep(after_s)
        assert await chats.chat.chat(None, "hello", **HOW) == await first
        assert len(chats.factory.built) == 1
        assert not chats.turns._claims

    for step in range(45):
        run(scene(step * 0.05))
        run(scene(step * 0.05 + 0.01))


@pytest.mark.parametrize("is_first", [True, False])
def test_a_request_with_a_key_may_be_cut_at_every_await(is_first):
    """Whichever of two equal requests is cut, and when, the other one has its answer, of one turn."""

    async def scene(victim):
        chats = await Chats.make()
        chats.store.fault_for = lambda _: Fault(delay_s=0.1, late_delay_s=0.1)
        other = None
        if not is_first:
            other = start(chats.chat.chat("a", "hello", **HOW))
            await asyncio.sleep(0.05)
        call = chats.chat.chat("a", "hello", **HOW)

        async def then_another():
            nonlocal other
            await asyncio.sleep(0.05)
            other = start(chats.chat.chat("a", "hello", **HOW))

        follow = start(then_another()) if is_first else None
        await victim(call)
        if follow is not None:
            await follow
        assert other is not None
        assert (await other).turn_count == 1
        assert inputs(chats) == ["hello"]
        assert not chats.turns._claims
        await chats.check_quiet()

    assert cut_everywhere(scene) >= 3
