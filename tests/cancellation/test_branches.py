"""Moves of the head, edits, other answers and summaries: while turns run, cut anywhere, and in doubt."""

import asyncio
from functools import partial

import pytest

from app.domain.branch import ROOT, Back, ToTurn
from app.domain.chat import OnBusy, RegenerateRequest
from app.domain.compaction import summary_messages
from app.domain.errors import (
    HeadMoved,
    ModelError,
    SessionArchived,
    SessionBusy,
    SessionNotFound,
    StoreUnavailable,
    TurnNotFound,
    TurnTimeout,
)
from app.domain.events import TurnCancelled, TurnFailed, TurnFinished
from app.domain.session import LifeSpan, SessionChange, SessionStatus
from app.domain.turn import CancelReason, UserText
from app.services.landing import CheckpointPlan
from tests.cancellation.chats import KEY, Chats, end_of
from tests.cancellation.driver import cut_everywhere
from tests.cancellation.world import failure_of, start
from tests.fakes import Fault, Gate, Script, new_ids
from tests.simulation.loop import settle, virtual

SLOW = Script(deltas=("so ", "far"), pause_s=5.0)


async def talked(turns: int = 3) -> Chats:
    """Return a session that has some turns, its agent in the pool."""
    chats = await Chats.make()
    for number in range(turns):
        await chats.chat.chat("a", f"message {number}")
    return chats


def inputs(chats: Chats) -> list[str]:
    return [turn.input for turn in chats.path()]


async def session_of(chats: Chats):
    found = await chats.store.inner.find_session(KEY)
    assert found is not None
    return found


async def do(chats: Chats, what: str, on_busy: OnBusy = OnBusy.QUEUE):
    if what == "rewind":
        return await chats.sessions.rewind("a", Back(1), on_busy=on_busy)
    if what == "restore":
        latest = await chats.sessions.latest_checkpoint("a")
        return await chats.sessions.restore("a", latest.checkpoint_id, on_busy=on_busy)
    return await chats.chat.compact(KEY, on_busy=on_busy)


HOLDERS = ["rewind", "restore", "compact"]


@pytest.mark.parametrize("what", HOLDERS)
@virtual
async def test_what_changes_a_branch_waits_for_the_running_turn(what):
    """It comes after the turn that runs and before the one that came later."""
    chats = await talked()
    await chats.sessions.create_checkpoint("a")
    chats.scripts.append(SLOW)
    running = await chats.begin("running")
    await running.wait_started()
    change = start(do(chats, what))
    await settle()
    later = await chats.begin("later")
    assert isinstance(await end_of(running), TurnFinished)
    await change
    assert isinstance(await end_of(later), TurnFinished)
    before = ["message 0", "message 1", "message 2"]
    assert (
        inputs(chats)
        == {
            "rewind": [*before, "later"],
            "restore": [*before, "later"],
            "compact": [*before, "running", "later"],
        }[what]
    )


@pytest.mark.parametrize("what", HOLDERS)
@virtual
async def test_what_changes_a_branch_may_refuse_to_wait(what):
    """With reject it is refused while a turn runs, which goes on."""
    chats = await talked()
    await chats.sessions.create_checkpoint("a")
    chats.scripts.append(SLOW)
    running = await chats.begin("running")
    await running.wait_started()
    error = await failure_of(do(chats, what, OnBusy.REJECT))
    assert isinstance(error, SessionBusy)
    assert isinstance(await end_of(running), TurnFinished)
    assert inputs(chats)[-1] == "running"


@pytest.mark.parametrize("on_busy", [OnBusy.INTERRUPT, OnBusy.ROLLBACK])
@pytest.mark.parametrize("what", HOLDERS)
@virtual
async def test_what_changes_a_branch_may_interrupt(what, on_busy):
    """It cancels the running turn as a chat would, goes first, and those that waited run after it."""
    chats = await talked()
    await chats.sessions.create_checkpoint("a")
    chats.scripts.append(SLOW)
    running = await chats.begin("running")
    await running.wait_started()
    await asyncio.sleep(1)
    waiting = await chats.begin("waiting")
    await settle()
    await do(chats, what, on_busy)
    ended = await end_of(running)
    assert isinstance(ended, TurnCancelled)
    kept = on_busy is OnBusy.INTERRUPT
    assert (ended.reason, ended.partial_kept) == (CancelReason(on_busy), kept)
    assert isinstance(await end_of(waiting), TurnFinished)
    whole = ["message 0", "message 1", "message 2", *(["running"] if kept else [])]
    assert inputs(chats)[:-1] == {"rewind": whole[:-1], "restore": whole[:3], "compact": whole}[what]


@virtual
async def test_a_head_that_moved_is_not_moved_from():
    """If-Match on a rewind counts when its turn has come: here another turn came first."""
    chats = await talked()
    head = chats.path()[-1].turn_id
    chats.scripts.append(SLOW)
    running = await chats.begin("running")
    await running.wait_started()
    error = await failure_of(chats.sessions.rewind("a", Back(1), expected_head=head))
    assert isinstance(error, HeadMoved)
    assert inputs(chats)[-1] == "running"
    moved = await chats.sessions.rewind("a", ToTurn(None), expected_head=running.turn_id)
    assert moved.session.head is None
    await chats.check_quiet()


@virtual
async def test_a_session_that_ended_meanwhile_is_not_moved():
    """Deleted or archived while the rewind waited: refused."""
    chats = await talked()
    chats.scripts += [SLOW, SLOW]
    running = await chats.begin("running")
    await running.wait_started()
    moving = start(chats.sessions.rewind("a", Back(1)))
    await settle()
    await chats.sessions.update("a", SessionChange(status=SessionStatus.ARCHIVED))
    assert isinstance(await failure_of(moving), SessionArchived)
    await chats.sessions.update("a", SessionChange(status=SessionStatus.ACTIVE))
    running = await chats.begin("running again")
    await running.wait_started()
    moving = start(chats.sessions.rewind("a", Back(1)))
    await settle()
    await chats.sessions.delete("a")
    assert isinstance(await failure_of(moving), SessionNotFound)


@virtual
async def test_an_edit_that_fails_changes_nothing():
    """Head, path and state are as before; the agent of the next turn knows nothing of it."""
    chats = await talked()
    first = chats.path()[0].turn_id
    await chats.sessions.patch_state("a", {"key": "value"})
    before = await session_of(chats)
    chats.scripts.append(Script(error=ModelError()))
    failed = await chats.begin("edited", parent=first)
    assert isinstance(await end_of(failed), TurnFailed)
    after = await session_of(chats)
    assert (after.head, after.depth, after.state) == (before.head, before.depth, {"key": "value"})
    await chats.check_quiet()


@virtual
async def test_an_edit_begins_where_it_says_and_brings_back_the_state():
    """The model is sent the path to the parent, and the state is that of then once it is committed."""
    chats = await talked()
    first = chats.path()[0].turn_id
    await chats.sessions.patch_state("a", {"key": "value"})
    seen: list[list[object]] = []
    chats.factory.script_for = lambda agent, _: seen.append(list(agent.messages)) or Script()
    reply = await chats.chat.chat("a", "edited", parent=first)
    assert reply.turn_count == 2
    assert [m.text for m in seen[0] if isinstance(m, UserText)] == ["message 0"]
    assert inputs(chats) == ["message 0", "edited"]
    assert (await session_of(chats)).state == {}
    at_root = await chats.chat.chat("a", "anew", parent=ROOT)
    assert (at_root.turn_count, seen[1]) == (1, [])
    await chats.check_quiet()


@virtual
async def test_another_answer_stands_beside_the_first_and_keeps_the_state():
    """The same input once more; both answers stay, the second is the head, the state is as it was."""
    chats = await talked(2)
    old = chats.path()[-1]
    await chats.sessions.patch_state("a", {"key": "value"})
    flight = await chats.chat.begin_again(RegenerateRequest(session_id="a"))
    assert isinstance(await end_of(flight), TurnFinished)
    new = chats.path()[-1]
    assert (new.parent, new.input, new.depth) == (old.parent, old.input, old.depth)
    assert new.turn_id != old.turn_id
    session = await session_of(chats)
    assert session.state == {"key": "value"}
    assert not (await chats.store.inner.get_turn(session, old.turn_id)).on_branch
    await chats.check_quiet()


@virtual
async def test_there_must_be_something_to_answer_or_to_sum_up():
    """In a session without a turn both are refused as a turn that is not there."""
    chats = await Chats.make()
    flight = await chats.chat.begin_again(RegenerateRequest(session_id="a"))
    assert isinstance(await end_of(flight), TurnNotFound)
    assert isinstance(await failure_of(chats.chat.compact(KEY)), TurnNotFound)
    await chats.check_quiet()


@virtual
async def test_a_turn_refused_at_boarding_leaves_the_agent_in_the_pool():
    """A parent that is not there costs nobody a live agent."""
    chats = await talked(1)
    built = len(chats.factory.built)
    unknown = "01a00000-0000-7000-8000-000000000000"
    refused = await chats.begin("edited", parent=unknown)
    assert isinstance(await end_of(refused), TurnNotFound)
    reply = await chats.chat.chat("a", "hello")
    assert (reply.activation, len(chats.factory.built)) == ("warm", built)
    nowhere = await failure_of(chats.begin("edited", session_id="nobody", parent=unknown))
    assert isinstance(nowhere, TurnNotFound)
    assert await chats.store.inner.find_session(KEY._replace(session_id="nobody")) is None


@virtual
async def test_a_commit_in_doubt_makes_one_checkpoint_and_one_branch():
    """The reply to the commit of an edit is lost; repeated, it has happened once."""
    chats = await talked(2)
    chats.conductor._landing._checkpoints = CheckpointPlan(1, 5, new_ids(900))
    unknown = StoreUnavailable(outcome_unknown=True)
    chats.store.plan("commit_turn", Fault(late_error=unknown), Fault(error=unknown))
    await chats.chat.chat("a", "edited", parent=chats.path()[0].turn_id)
    assert inputs(chats) == ["message 0", "edited"]
    page = await chats.sessions.list_checkpoints("a")
    assert [(c.automatic, c.turn_id) for c in page.checkpoints] == [(True, chats.path()[-1].turn_id)]
    await chats.check_quiet()


@virtual
async def test_a_purged_session_has_no_agent():
    """What is purged leaves nothing in the pool; the agent of a session that stays is not touched."""
    chats = await talked(1)
    await chats.chat.chat("b", "hello")
    await chats.sessions.update("a", SessionChange(ttl_s=1))
    assert chats.pool.live_count() == 2
    await asyncio.sleep(LifeSpan().retention_s + 2)
    assert await chats.sessions.cleanup() == (1, 1)
    assert [live.session_id for live in chats.pool.live_sessions()] == ["b"]
    with pytest.raises(SessionNotFound):
        await chats.sessions.get("a")


# -- summaries


async def context_of_next(chats: Chats) -> tuple[object, ...]:
    seen: list[tuple[object, ...]] = []
    chats.factory.script_for = lambda agent, _: seen.append(tuple(agent.messages)) or Script()
    for agent in chats.factory.built:
        agent._script_for = chats.factory.script_for
    await chats.chat.chat("a", "the next one")
    return seen[0]


@virtual
async def test_a_summary_stands_for_what_it_sums_up():
    """The model is sent it and what came after; history, head and counts stay; again it is not made."""
    chats = await talked()
    before = await session_of(chats)
    note = await chats.chat.compact(KEY)
    after = await session_of(chats)
    assert (note.turn_id, note.summary) == (before.head, "What was said.")
    assert (after.head, after.depth, after.message_count) == (before.head, before.depth, 6)
    assert inputs(chats) == ["message 0", "message 1", "message 2"]
    assert await chats.chat.compact(KEY) == note
    assert len(chats.factory.summarised) == 1
    assert await context_of_next(chats) == summary_messages("What was said.")


@virtual
async def test_a_summary_that_fails_changes_nothing():
    """The model's error is told; the next turn is sent everything."""
    chats = await talked()
    before = await session_of(chats)
    chats.factory.summary = ModelError()
    assert isinstance(await failure_of(chats.chat.compact(KEY)), ModelError)
    assert await session_of(chats) == before
    await chats.check_quiet()


@virtual
async def test_a_summary_has_a_deadline():
    """A model that never ends it costs the session its deadline, and changes nothing."""
    chats = await talked()
    chats.factory.summary_gate = Gate()
    assert isinstance(await failure_of(chats.chat.compact(KEY)), TurnTimeout)
    await chats.check_quiet()


@virtual
async def test_a_long_session_is_summed_up_by_itself_and_turns_do_not_wait():
    """Above the limit it is done behind a turn; the next turn runs meanwhile and keeps what it had."""
    chats = await talked(1)
    chats.compactor._after_tokens = 1
    chats.factory.summary_gate = gate = Gate()
    await chats.chat.chat("a", "long")
    await settle()
    assert len(chats.compactor._tasks) == 1
    await chats.chat.chat("a", "meanwhile")
    assert len(chats.factory.summarised) == 1
    chats.compactor._after_tokens = 0
    gate.open()
    await settle()
    assert len(chats.compactor._tasks) == 0
    context = await context_of_next(chats)
    assert context[:2] == summary_messages("What was said.")
    assert [m.text for m in context[2:] if isinstance(m, UserText)] == ["meanwhile"]
    assert inputs(chats) == ["message 0", "long", "meanwhile", "the next one"]


@virtual
async def test_a_summary_that_is_long_itself_is_not_summed_up_at_once():
    """Until the context has doubled, since it would cost and not help."""
    chats = await talked(2)
    chats.compactor._after_tokens = 1
    note = await chats.chat.compact(KEY)
    for tokens, made in ((2 * note.tokens_after - 1, 1), (2 * note.tokens_after, 2)):
        chats.compactor.consider(await session_of(chats), tokens)
        await settle()
        assert len(chats.factory.summarised) == made


# -- cut anywhere


def slow_store(chats: Chats) -> None:
    chats.store.fault_for = lambda _: Fault(delay_s=0.1, late_delay_s=0.1)


@pytest.mark.parametrize("what", [*HOLDERS, "fork", "checkpoint", "edit", "again"])
def test_what_changes_a_branch_may_be_cut_anywhere(what):
    """Cut at any await it has happened or not, nobody waits for ever, and the agent knows the path."""

    async def scene(victim):
        chats = await talked(2)
        await chats.sessions.create_checkpoint("a")
        slow_store(chats)
        first = chats.path()[0].turn_id
        acts = {
            "fork": partial(chats.sessions.fork, "a", session_id="b"),
            "checkpoint": partial(chats.sessions.create_checkpoint, "a"),
            "edit": partial(chats.chat.chat, "a", "edited", parent=first),
            "again": partial(_regenerate, chats),
        }
        was_cut = await victim(acts[what]() if what in acts else do(chats, what))
        await asyncio.sleep(60)
        ends = {
            "rewind": [["message 0"]],
            "edit": [["message 0", "edited"]],
        }
        possible = ends.get(what, [["message 0", "message 1"]])
        if was_cut:
            possible = [*possible, ["message 0", "message 1"]]
        assert inputs(chats) in possible
        if what == "compact":
            context = await context_of_next(chats)
            whole = tuple(message for turn in chats.path()[:-1] for message in turn.messages)
            assert context in (summary_messages("What was said."), *([whole] if was_cut else []))
        else:
            await chats.check_quiet()

    assert cut_everywhere(scene) >= 2


async def _regenerate(chats: Chats) -> None:
    flight = await chats.chat.begin_again(RegenerateRequest(session_id="a"))
    try:
        await end_of(flight)
    finally:
        flight.leave()
