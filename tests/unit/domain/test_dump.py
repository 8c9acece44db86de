"""Dumps: when they are whole, and what tells that two are the same."""

from dataclasses import replace

import pytest

from app.domain.checkpoint import Checkpoint
from app.domain.compaction import Note
from app.domain.dump import CheckpointDump, RestDump, SessionDump, TurnDump, canonical
from app.domain.idempotency import Binding
from app.domain.ids import SessionKey
from app.domain.journal import HeadChanged, LoggedFact, StateChanged
from app.domain.session import Session
from app.domain.turn import Activation, AssistantText, Turn, TurnStatus, UserText

SESSION = Session(
    key=SessionKey("o", "s"),
    uid="u",
    app_name="a",
    agent_id="g",
    created_at=1,
    updated_at=1,
    last_accessed=1,
    expires_at=None,
    head="t2",
    depth=2,
    note="n",
)


def turn(turn_id: str, parent: str | None, depth: int, status: TurnStatus = TurnStatus.FINISHED) -> TurnDump:
    made = Turn(
        turn_id=turn_id,
        parent=parent,
        depth=depth,
        status=status,
        input="hi",
        agent_id="g",
        provider="p",
        model="m",
        activation=Activation.NEW,
        started_at=5,
        boot_id="b",
        binding=Binding("o", turn_id, b"\x00\xff"),
    )
    return TurnDump(made, {} if made.is_committed else None)


NOTE = Note(note_id="n", turn_id="t1", summary="x", tokens_before=2, tokens_after=1, created_at=1)
NAMED = CheckpointDump(Checkpoint(checkpoint_id="c", turn_id="t1", created_at=1), {})
TURNS = (turn("t1", None, 1), turn("t2", "t1", 2), turn("t3", "t2", 3, TurnStatus.RUNNING))
DUMP = SessionDump(SESSION, {"a": 1}, TURNS, (NOTE,), (LoggedFact(1, 1, StateChanged({"a": 1})),), (NAMED,))


def test_a_dump_with_all_its_parts_is_whole() -> None:
    """Also without turns, and with a leaf less that nothing refers to."""
    assert DUMP.is_whole()
    assert replace(DUMP, turns=TURNS[:2]).is_whole()
    empty = replace(SESSION, head=None, depth=0, note=None)
    assert SessionDump(empty, {}).is_whole()


@pytest.mark.parametrize(
    "lacking",
    [
        replace(DUMP, turns=TURNS[1:]),
        replace(DUMP, turns=(TURNS[0], TURNS[2])),
        replace(DUMP, turns=TURNS[:1]),
        replace(DUMP, turns=()),
        replace(DUMP, notes=()),
        replace(DUMP, notes=(NOTE, replace(NOTE, note_id="m", turn_id="t3"))),
        replace(DUMP, checkpoints=(CheckpointDump(replace(NAMED.checkpoint, turn_id="t9"), {}),)),
        replace(DUMP, session=replace(SESSION, head="t3", depth=3)),
        replace(DUMP, session=replace(SESSION, depth=1)),
        replace(DUMP, session=replace(SESSION, head=None)),
        replace(DUMP, turns=(*TURNS, turn("t4", "t2", 4))),
        replace(DUMP, turns=(*TURNS, turn("t4", "t3", 4))),
        replace(DUMP, turns=(*TURNS, turn("t4", "t9", 1, TurnStatus.FAILED))),
    ],
)
def test_what_refers_to_a_missing_part_is_not_whole(lacking: SessionDump) -> None:
    """A head, a parent, a note or a checkpoint whose turn is gone, was never committed, or is elsewhere."""
    assert not lacking.is_whole()


def test_a_settled_dump_has_no_running_turn() -> None:
    """What runs has failed at its start and has no key; all else is as it was, and stays so."""
    settled = DUMP.settled()
    assert settled.turns[:2] == TURNS[:2]
    ended = settled.turns[2].turn
    assert (ended.status, ended.finished_at, ended.binding) == (TurnStatus.FAILED, 5, None)
    assert ended.error is not None
    assert ended.error.code == "INTERRUPTED"
    assert settled.settled() == settled
    assert replace(settled, turns=TURNS) == DUMP


def test_equal_dumps_have_equal_json() -> None:
    """Whatever the order of an object's keys, with text that is not UTF-8, and with counters of nothing."""
    one = replace(DUMP, root_state={"a": "\ud800\x00", "b": {"c": 1, "d": 2}})
    other = replace(DUMP, root_state={"b": {"d": 2, "c": 1}, "a": "\ud800\x00"})
    assert canonical(one) == canonical(other)
    counted = RestDump((), (), {"turns": 3})
    assert canonical(replace(counted, totals={"ms:7": 0, "created": 0, "turns": 3})) == canonical(counted)


def said(*messages: UserText | AssistantText) -> SessionDump:
    first = replace(TURNS[0], turn=replace(TURNS[0].turn, messages=messages))
    return replace(DUMP, turns=(first, *TURNS[1:]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (replace(DUMP, root_state={"a": 1}), replace(DUMP, root_state={"a": 1.0})),
        (replace(DUMP, root_state={"a": 1}), replace(DUMP, root_state={"a": True})),
        (replace(DUMP, root_state={"a": 2**70}), replace(DUMP, root_state={"a": float(2**70)})),
        (said(AssistantText("x")), said(AssistantText("x", interrupted=True))),
        (said(UserText("x")), said(UserText("x"), UserText(""))),
        (DUMP, DUMP.settled()),
        (DUMP, replace(DUMP, facts=())),
        (RestDump((), (), {}), RestDump((), (), {"turns": 1})),
    ],
)
def test_different_dumps_have_different_json(
    one: SessionDump | RestDump, other: SessionDump | RestDump
) -> None:
    """Also where Python holds them for equal: 1, 1.0 and true."""
    assert canonical(one) != canonical(other)


def test_values_of_other_kinds_have_no_json() -> None:
    """What is neither JSON nor a value of ours is a mistake, not something to be left out."""
    wrong = replace(DUMP, root_state={"a": HeadChanged})
    with pytest.raises(TypeError):
        canonical(wrong)
