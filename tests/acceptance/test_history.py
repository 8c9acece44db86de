"""The checker of histories finds every kind of fault, and none where there is none."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.acceptance.history import Log, Message, Op, check, messages_of, text_of


def op(number: int, outcome: str = "ok", session: str = "a", **fields: object) -> Op:
    """Return the request of message ``number``, which takes from ``number`` to ``number`` + 0.5."""
    made = Op(
        t0=number,
        t1=number + 0.5,
        session=session,
        text=text_of(session, number),
        outcome=outcome,  # type: ignore[arg-type]
        turn_id=f"{session}-t{number}" if outcome == "ok" else None,
        reply=f"re {text_of(session, number)}" if outcome == "ok" else None,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def pair(number: int, session: str = "a") -> list[Message]:
    text, turn_id = text_of(session, number), f"{session}-t{number}"
    return [Message("user", text, turn_id), Message("assistant", f"re {text}", turn_id)]


OPS = [op(1), op(2, "fail"), op(3, "unknown"), op(4, "unknown"), op(5), op(6)]
GOOD = [*pair(1), *pair(3), *pair(5), *pair(6)]


def test_a_history_that_agrees_has_no_fault() -> None:
    """Answered messages once and in order, refused ones not, unknown ones there or not."""
    assert check(OPS, {"a": GOOD}) == []
    assert check([*OPS, op(1, session="b")], {"a": GOOD, "b": pair(1, "b")}) == []


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("lost", [*pair(1), *pair(3), *pair(6)]),
        ("lost", []),
        ("doubled", [*GOOD, *pair(6)]),
        ("doubled", [*pair(1), *pair(3), *pair(3), *pair(5), *pair(6)]),
        ("undead", [*pair(1), *pair(2), *pair(5), *pair(6)]),
        ("invented", [*GOOD, *pair(9)]),
        ("torn", GOOD[:-1]),
        ("torn", [*GOOD[:-1], Message("assistant", "re", "a-t6")]),
        ("torn", [*GOOD[1:]]),
        ("torn", [GOOD[0], *GOOD[2:]]),
        ("interleaved", [*pair(1), pair(5)[0], pair(6)[1], pair(6)[0], pair(5)[1]]),
        ("torn", [*pair(1), pair(5)[0], pair(6)[0], pair(5)[1], pair(6)[1]]),
        ("reordered", [*pair(1), *pair(6), *pair(5)]),
        ("reordered", [*pair(5), *pair(1), *pair(6)]),
        ("foreign", [*GOOD[:-1], Message("assistant", f"re {text_of('b', 1)}", "a-t6")]),
        ("foreign", [*GOOD, *pair(1, "b")]),
        ("trace", [*GOOD[:-1], Message("assistant", f"re {text_of('a', 2)}", "a-t6")]),
    ],
)
def test_a_planted_fault_is_found(kind: str, kept: list[Message]) -> None:
    """Whatever is taken out, put in twice, cut, mixed or exchanged is named."""
    assert kind in {fault.kind for fault in check(OPS, {"a": kept})}


def test_a_session_that_is_gone_has_lost_its_messages() -> None:
    """Without any history each answered message is lost."""
    assert [fault.kind for fault in check(OPS, {})] == ["lost"] * 3


def test_one_key_makes_one_turn() -> None:
    """Repeats of a message with its key may all be answered, by one turn; two turns are a fault."""
    first = op(7, "unknown", key="k")
    answered = [replace(op(7), key="k", t0=8.0, t1=9.0), replace(op(7), key="k", t0=9.0, t1=9.5)]
    assert check([*OPS, first, *answered], {"a": [*GOOD, *pair(7)]}) == []
    twice = replace(answered[1], turn_id="a-t8")
    assert "doubled" in {f.kind for f in check([*OPS, first, answered[0], twice], {"a": [*GOOD, *pair(7)]})}


def test_messages_that_ran_side_by_side_have_no_order() -> None:
    """Of two messages whose requests overlapped either may come first."""
    side = [op(1, t1=3.0), op(2, t1=3.0)]
    assert check(side, {"a": [*pair(1), *pair(2)]}) == []
    assert check(side, {"a": [*pair(2), *pair(1)]}) == []


def test_a_log_gives_back_what_was_written(tmp_path: Path) -> None:
    """Each request comes back from its line of JSON as it was."""
    log = Log(tmp_path / "ops.jsonl")
    for each in OPS:
        log.write(each)
    assert log.read() == OPS


def test_messages_are_read_from_an_answer() -> None:
    """What the server shows of a message beside role, text and turn does not matter."""
    shown = [{"role": "user", "content": "x", "turn_id": "t", "created_at": "…"}]
    assert messages_of(shown) == [Message("user", "x", "t")]
