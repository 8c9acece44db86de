"""What every store promises about turns: the commit, the path, the listings."""

import asyncio
from dataclasses import replace

import pytest

from app.domain.errors import HeadMoved, InvalidInput, SessionNotFound, TurnNotFound
from app.domain.turn import (
    Activation,
    AssistantText,
    CancelReason,
    ToolCall,
    ToolCalls,
    ToolResult,
    ToolResults,
    Turn,
    TurnError,
    TurnStatus,
    UserText,
)
from app.ports import SessionStore

from .builders import BOOT, LIFE, T0, dropped, extend, failed, make_session, make_turn, new_id, running
from .conftest import Place

WEIRD = "emoji 🤦🏽‍♂️ \u2028\u2029 'quotes\" \\ \x00 \x7f \ufeff אב 您好"


async def test_a_commit_moves_the_head_and_counts_as_activity(store: SessionStore) -> None:
    """A commit returns the session with the new head, depth and times, and that is what is stored."""
    session = make_session(marked_idle=True)
    await store.create_session(session)
    turn = make_turn(session)
    after = await store.commit_turn(session, turn)
    now = turn.finished_at or 0
    expected = replace(
        session.touched(now, LIFE), head=turn.turn_id, depth=1, updated_at=now, marked_idle=False
    )
    assert after == expected
    assert await store.find_session(session.key) == after
    assert after.expires_at == now + LIFE.ttl_s * 1000


async def test_a_turn_comes_back_as_it_was(place: Place) -> None:
    """Tool calls, reasoning, errors, sequence numbers and strange text survive a restart unchanged."""
    session = make_session()
    await place.store.create_session(session)
    messages = (
        UserText(WEIRD),
        ToolCalls((ToolCall("c1", "add", '{"a": 1}'), ToolCall("c2", "add", "not json")), "let me", "hm"),
        ToolResults((ToolResult("c1", "add", "1"), ToolResult("c2", "add", "boom", is_error=True))),
        AssistantText("answer " + WEIRD, "because", interrupted=True),
    )
    turn = make_turn(
        session, WEIRD, messages=messages, reply="let meanswer " + WEIRD, tool_seqs=(2, 3, 4, 5), last_seq=9,
        status=TurnStatus.CANCELLED, kept=True, cancel_reason=CancelReason.INTERRUPT, finish_reason=None,
        queued_ms=17, activation=Activation.RESTORED,
    )  # fmt: skip
    session = await place.store.commit_turn(session, turn)
    odd = make_turn(
        session, "as sent", reply="not what was said", finish_reason="length", activation=Activation.NEW
    )
    session = await place.store.commit_turn(session, odd)
    bad = replace(failed(make_turn(session)), messages=(), error=TurnError("MODEL_ERROR", WEIRD))
    await place.store.record_turn(session, bad)
    store = await place.restart("boot-2")
    assert await store.get_turn(session, turn.turn_id) == replace(turn, on_branch=True)
    assert await store.get_turn(session, odd.turn_id) == replace(odd, on_branch=True)
    assert await store.get_turn(session, bad.turn_id) == bad


@pytest.mark.parametrize("text", ["", WEIRD, "x" * 100_000, "您" * 100_000, "lone \ud800 surrogate"])
async def test_any_text_comes_back(store: SessionStore, text: str) -> None:
    """An answer of any length and content is read back character for character."""
    session = make_session()
    await store.create_session(session)
    turn = make_turn(session, "say it", text)
    session = await store.commit_turn(session, turn)
    assert (await store.load_path(session)).messages == turn.messages
    assert (await store.get_turn(session, turn.turn_id)).reply == text


async def test_the_path_is_every_committed_message_in_order(place: Place) -> None:
    """The path holds the messages from the root to the head, oldest first, and nothing that failed."""
    session = make_session()
    await place.store.create_session(session)
    assert (await place.store.load_path(session)).messages == ()
    session, turns = await extend(place.store, session, 20)
    await place.store.record_turn(session, failed(make_turn(session)))
    await place.store.record_turn(session, dropped(make_turn(session)))
    await place.store.start_turn(session, running(make_turn(session)))
    session, more = await extend(place.store, session, 1)
    path = await (await place.restart("boot-2")).load_path(session)
    assert path.messages == tuple(message for turn in turns + more for message in turn.messages)
    assert (path.head, path.note) == (session.head, None)
    assert path.stored_bytes > 21 * 20


async def test_the_path_is_that_of_the_given_head(store: SessionStore) -> None:
    """A session value from before a commit loads the path as it was then."""
    session = make_session()
    await store.create_session(session)
    before, turns = await extend(store, session, 2)
    await extend(store, before, 1)
    path = await store.load_path(before)
    assert path.messages == turns[0].messages + turns[1].messages


async def test_a_commit_onto_a_moved_head_is_refused(store: SessionStore) -> None:
    """Of two turns from one head the second raises HeadMoved, which names it, and leaves all as it is."""
    session = make_session()
    await store.create_session(session)
    after = await store.commit_turn(session, make_turn(session, "first"))
    late = make_turn(session, "second")
    with pytest.raises(HeadMoved) as caught:
        await store.commit_turn(session, late)
    assert caught.value.turn_id == late.turn_id
    assert await store.find_session(session.key) == after
    with pytest.raises(TurnNotFound):
        await store.get_turn(session, late.turn_id)


async def test_repeating_a_commit_changes_nothing(store: SessionStore) -> None:
    """The same turn again returns the session as it is now, also after the head moved on."""
    session = make_session()
    await store.create_session(session)
    turn = make_turn(session)
    first = await store.commit_turn(session, turn)
    assert await store.commit_turn(session, turn) == first
    second = await store.commit_turn(first, make_turn(first))
    assert await store.commit_turn(session, turn) == second
    assert (await store.list_turns(session, 10)).total == 2


async def test_a_commit_needs_no_start_record(store: SessionStore) -> None:
    """A turn whose start was never noted commits all the same, and once."""
    session = make_session()
    await store.create_session(session)
    await store.commit_turn(session, make_turn(session))
    with_start = await store.find_session(session.key)
    assert with_start is not None
    turn = make_turn(with_start)
    await store.start_turn(with_start, running(turn))
    await store.start_turn(with_start, running(turn))
    await store.commit_turn(with_start, turn)
    page = await store.list_turns(session, 10)
    assert [one.status for one in page.turns] == [TurnStatus.FINISHED, TurnStatus.FINISHED]


async def test_a_commit_never_brings_a_deleted_session_back(store: SessionStore) -> None:
    """A commit after the delete raises SessionNotFound and stores nothing."""
    session = make_session()
    await store.create_session(session)
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    await store.delete_session(session.key)
    with pytest.raises(SessionNotFound):
        await store.commit_turn(session, turn)
    assert await store.find_session(session.key) is None
    assert store.session_count_nowait() == 0


async def test_a_failed_turn_cannot_be_committed(store: SessionStore) -> None:
    """Once recorded as failed a turn stays so: its commit raises HeadMoved."""
    session = make_session()
    await store.create_session(session)
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    bad = failed(turn)
    await store.record_turn(session, bad)
    with pytest.raises(HeadMoved):
        await store.commit_turn(session, turn)
    assert await store.get_turn(session, turn.turn_id) == bad


async def test_a_committed_turn_cannot_be_recorded_as_failed(store: SessionStore) -> None:
    """Recording a turn that was committed does nothing; recording one twice keeps the first."""
    session = make_session()
    await store.create_session(session)
    turn = make_turn(session)
    session = await store.commit_turn(session, turn)
    await store.record_turn(session, failed(turn))
    assert await store.get_turn(session, turn.turn_id) == replace(turn, on_branch=True)
    other = make_turn(session)
    await store.record_turn(session, failed(other))
    await store.record_turn(session, dropped(other))
    assert (await store.get_turn(session, other.turn_id)).status is TurnStatus.FAILED


async def test_a_recorded_turn_leaves_the_head(store: SessionStore) -> None:
    """A failed turn counts as activity, but head, depth, revision and ETag stay."""
    session = make_session()
    await store.create_session(session)
    turn = failed(make_turn(session))
    await store.record_turn(session, turn)
    after = await store.find_session(session.key)
    assert after == session.touched(turn.finished_at or 0, LIFE)
    assert after.etag == session.etag


async def test_a_start_counts_as_activity(store: SessionStore) -> None:
    """Starting a turn sets the session's last activity and takes back its idle mark."""
    session = make_session(marked_idle=True)
    await store.create_session(session)
    turn = make_turn(session, started_at=T0 + 50)
    await store.start_turn(session, running(turn))
    await store.ping()
    assert await store.find_session(session.key) == session.touched(T0 + 50, LIFE)


async def test_only_ended_turns_of_the_right_kind_are_taken(store: SessionStore) -> None:
    """Committing a failed turn, recording a good one or skipping a depth is a ValueError."""
    session = make_session()
    await store.create_session(session)
    turn = make_turn(session)
    for wrong in (failed(turn), dropped(turn), running(turn), replace(turn, depth=2)):
        with pytest.raises(ValueError):
            await store.commit_turn(session, wrong)
    for wrong in (turn, running(turn)):
        with pytest.raises(ValueError):
            await store.record_turn(session, wrong)


async def test_turns_of_a_dead_boot_become_interrupted(place: Place) -> None:
    """After a restart what ran is failed, INTERRUPTED, with two events; what ran here still runs."""
    session = make_session()
    await place.store.create_session(session)
    turn = make_turn(session)
    await place.store.start_turn(session, running(turn))
    store = await place.restart("boot-2")
    dead = await store.get_turn(session, turn.turn_id)
    assert (dead.status, dead.last_seq, dead.tool_seqs) == (TurnStatus.FAILED, 2, ())
    assert dead.error is not None
    assert dead.error.code == "INTERRUPTED"
    assert dead.finished_at is not None
    assert dead.finished_at >= dead.started_at
    assert dead.input == "hi"
    mine = make_turn(session, boot_id="boot-2")
    await store.start_turn(session, running(mine))
    store = await place.restart("boot-2")
    assert (await store.get_turn(session, mine.turn_id)).status is TurnStatus.RUNNING
    after = await store.commit_turn(session, mine)
    assert after.head == mine.turn_id


async def test_turns_are_listed_newest_first_without_loss(store: SessionStore) -> None:
    """Pages of 7 over 211 turns, several with equal start, give each once; one of them still runs."""
    session = make_session()
    await store.create_session(session)
    made: list[Turn] = []
    for number in range(105):
        for kind in (None, failed):
            turn = make_turn(session, f"q{number}", started_at=T0 + number // 4)
            made.append(turn)
            if kind:
                await store.record_turn(session, kind(turn))
            else:
                session = await store.commit_turn(session, turn)
    last = make_turn(session, started_at=T0 + 1000)
    await store.start_turn(session, running(last))
    await store.ping()
    listed: list[Turn] = []
    cursor = None
    while True:
        page = await store.list_turns(session, 7, cursor)
        assert page.total == 211
        listed += page.turns
        cursor = page.next_cursor
        if cursor is None:
            break
    ordered = sorted([*made, last], key=lambda turn: (turn.started_at, turn.turn_id), reverse=True)
    assert [turn.turn_id for turn in listed] == [turn.turn_id for turn in ordered]
    assert listed[0].status is TurnStatus.RUNNING
    assert [turn.on_branch for turn in listed] == [turn.status is TurnStatus.FINISHED for turn in listed]


@pytest.mark.parametrize("cursor", ["", "x", "czEuMQ", "dDEuYWJj🙂", "dHguMQ"])
async def test_a_foreign_turn_cursor_is_refused(store: SessionStore, cursor: str) -> None:
    """A cursor that no listing of turns gave raises InvalidInput."""
    session = make_session()
    await store.create_session(session)
    with pytest.raises(InvalidInput):
        await store.list_turns(session, 10, cursor)


async def test_the_branch_is_read_backwards_in_pages(store: SessionStore) -> None:
    """The newest turns come ascending; ``before`` goes on with those above it, up to the root."""
    session = make_session()
    await store.create_session(session)
    assert await store.list_branch(session, 3) == ()
    session, turns = await extend(store, session, 8)
    await store.record_turn(session, failed(make_turn(session)))
    ids = [turn.turn_id for turn in turns]
    newest = await store.list_branch(session, 3)
    assert newest == tuple(replace(turn, on_branch=True) for turn in turns[5:])
    assert [t.turn_id for t in await store.list_branch(session, 3, ids[5])] == ids[2:5]
    assert [t.turn_id for t in await store.list_branch(session, 3, ids[2])] == ids[:2]
    assert await store.list_branch(session, 3, ids[0]) == ()
    assert [t.turn_id for t in await store.list_branch(session, 8)] == ids


async def test_only_turns_of_the_branch_can_be_before(store: SessionStore) -> None:
    """An unknown id, a failed turn, or another session's turn as ``before`` raises TurnNotFound."""
    session, other = make_session("s1"), make_session("s2")
    await store.create_session(session)
    await store.create_session(other)
    session, _ = await extend(store, session, 1)
    _, (foreign,) = await extend(store, other, 1)
    bad = failed(make_turn(session))
    await store.record_turn(session, bad)
    for turn_id in (bad.turn_id, foreign.turn_id, new_id(), "no id", ""):
        with pytest.raises(TurnNotFound):
            await store.list_branch(session, 3, turn_id)


async def test_a_turn_is_found_only_in_its_session(store: SessionStore) -> None:
    """An unknown turn, a malformed id and another session's turn are all TurnNotFound."""
    session, other = make_session("s1"), make_session("s2")
    await store.create_session(session)
    await store.create_session(other)
    _, (foreign,) = await extend(store, other, 1)
    for turn_id in (foreign.turn_id, new_id(), "no id", "", "🙂" * 36):
        with pytest.raises(TurnNotFound):
            await store.get_turn(session, turn_id)


async def test_one_of_ten_racing_commits_wins(store: SessionStore) -> None:
    """Ten turns from one head at once: exactly one is committed, nine raise HeadMoved."""
    session = make_session()
    await store.create_session(session)
    turns = [make_turn(session, f"racer {number}") for number in range(10)]
    results = await asyncio.gather(
        *(store.commit_turn(session, turn) for turn in turns), return_exceptions=True
    )
    won = [turn for turn, result in zip(turns, results, strict=True) if not isinstance(result, BaseException)]
    assert len(won) == 1
    assert sum(isinstance(result, HeadMoved) for result in results) == 9
    after = await store.find_session(session.key)
    assert after is not None
    assert (after.head, after.depth) == (won[0].turn_id, 1)
    assert (await store.list_turns(session, 20)).total == 1


async def test_fifty_sessions_commit_side_by_side(store: SessionStore) -> None:
    """Fifty sessions with ten turns each at once: every session ends with exactly its own ten."""
    sessions = [make_session(f"s{number}") for number in range(50)]
    await asyncio.gather(*(store.create_session(session) for session in sessions))
    ended = await asyncio.gather(*(extend(store, session, 10) for session in sessions))
    for session, turns in ended:
        path = await store.load_path(session)
        assert path.messages == tuple(message for turn in turns for message in turn.messages)


async def test_a_cancelled_caller_does_not_undo_its_commit(store: SessionStore) -> None:
    """When the caller is cancelled while its commit is under way, the turn is stored all the same."""
    session = make_session()
    await store.create_session(session)
    turn = make_turn(session)
    call = asyncio.get_running_loop().create_task(store.commit_turn(session, turn))
    await asyncio.sleep(0)  # it has handed its write over and waits
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await store.ping()
    after = await store.find_session(session.key)
    assert after is not None
    assert after.head == turn.turn_id
    assert (await store.commit_turn(session, turn)).head == turn.turn_id


async def test_close_finishes_what_was_accepted(place: Place) -> None:
    """Commits and start records handed over before close are there after the restart."""
    busy, *sessions = [make_session(f"s{number}") for number in range(100)]
    for session in (busy, *sessions):
        await place.store.create_session(session)
    turns = [make_turn(session) for session in sessions]
    loop = asyncio.get_running_loop()
    calls = [
        loop.create_task(place.store.commit_turn(session, turn))
        for session, turn in zip(sessions, turns, strict=True)
    ]
    await asyncio.sleep(0)
    extra = make_turn(busy, boot_id=BOOT)
    await place.store.start_turn(busy, running(extra))
    store = await place.restart(BOOT)
    assert {call.done() for call in calls} == {True}
    for session, turn in zip(sessions, turns, strict=True):
        assert (await store.get_turn(session, turn.turn_id)).on_branch
    assert (await store.get_turn(busy, extra.turn_id)).status is TurnStatus.RUNNING
