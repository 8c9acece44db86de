"""Stored bytes: what goes in comes out, and whatever was changed is noticed."""

import json
import pickle
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.errors import SnapshotUnreadable
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
    Usage,
    UserText,
)
from app.stores.codec import (
    COMPACT,
    PLAIN,
    TurnColumns,
    from_json_text,
    from_turn_value,
    messages_of,
    to_body,
    to_json_text,
    to_turn_body,
)
from app.stores.sealing import NO_KEYS

COVER = b"cover"

texts = st.text(st.characters(), max_size=20)
counts = st.integers(0, 2**40)
calls = st.builds(ToolCall, texts, texts, texts)
results = st.builds(ToolResult, texts, texts, texts, st.booleans())
messages = st.one_of(
    st.builds(UserText, texts),
    st.builds(AssistantText, texts, texts, st.booleans()),
    st.builds(ToolCalls, st.lists(calls, max_size=3).map(tuple), texts, texts),
    st.builds(ToolResults, st.lists(results, max_size=3).map(tuple)),
)
turns = st.builds(
    Turn,
    turn_id=st.just("t"),
    parent=st.none(),
    depth=counts,
    status=st.sampled_from(TurnStatus),
    input=texts,
    agent_id=texts,
    provider=texts,
    model=texts,
    activation=st.sampled_from(Activation),
    started_at=counts,
    boot_id=texts,
    finished_at=st.none() | counts,
    queued_ms=counts,
    duration_ms=counts,
    messages=st.lists(messages, max_size=5).map(tuple),
    reply=st.none() | texts,
    finish_reason=st.sampled_from([None, "stop", "length"]),
    usage=st.builds(Usage, counts, counts),
    error=st.none() | st.builds(TurnError, texts, texts, st.none() | st.floats(0, 100)),
    cancel_reason=st.none() | st.sampled_from(CancelReason),
    kept=st.booleans(),
    tool_seqs=st.lists(counts, max_size=4).map(tuple),
    last_seq=counts,
)


def _columns(turn: Turn) -> TurnColumns:
    return TurnColumns(**{name: getattr(turn, name) for name in TurnColumns._fields})


@given(turns)
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
def test_any_turn_comes_back(turn: Turn) -> None:
    """Whatever its fields hold, lone surrogates too, a turn is read as it was written."""
    value = NO_KEYS.open(NO_KEYS.seal(to_turn_body(turn), COVER), COVER)
    assert from_turn_value(_columns(turn), value) == turn
    assert messages_of(value) == turn.messages


def _short_turn() -> Turn:
    return Turn(
        turn_id="t", parent=None, depth=1, status=TurnStatus.FINISHED, input="hi", agent_id="a", provider="p",
        model="m", activation=Activation.WARM, started_at=1, boot_id="b", finished_at=2, reply="Hello Alice!",
        messages=(UserText("hi"), AssistantText("Hello Alice!")), finish_reason="stop",
    )  # fmt: skip


def test_nothing_is_stored_twice() -> None:
    """Input and reply that the messages hold, and every default, take no byte."""
    assert to_turn_body(_short_turn()) == bytes([COMPACT]) + b'[[["u","hi"],["a","Hello Alice!"]]]'


def test_every_flipped_bit_is_noticed() -> None:
    """No single bit of the stored bytes can change unseen, nor one of what they vouch for."""
    raw = NO_KEYS.seal(to_turn_body(_short_turn()), COVER)
    for bit in range(len(raw) * 8):
        broken = bytearray(raw)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SnapshotUnreadable):
            NO_KEYS.open(bytes(broken), COVER)
    with pytest.raises(SnapshotUnreadable):
        NO_KEYS.open(raw, b"caver")


@pytest.mark.parametrize("length", [0, 1, 4, 5, 6, -1])
def test_cut_bytes_are_noticed(length: int) -> None:
    """Bytes that end early are unreadable, wherever they end."""
    with pytest.raises(SnapshotUnreadable):
        NO_KEYS.open(NO_KEYS.seal(to_turn_body(_short_turn()), COVER)[:length], COVER)


@pytest.mark.parametrize("raw", [None, "text", 5, 1.5])
def test_what_is_no_bytes_is_unreadable(raw: Any) -> None:
    """A value of another type than bytes is unreadable."""
    with pytest.raises(SnapshotUnreadable):
        NO_KEYS.open(raw, COVER)


def test_an_unknown_format_is_unreadable() -> None:
    """A format number that this version does not know is refused though its checksum fits."""
    for number in set(range(256)) - {COMPACT, PLAIN}:
        with pytest.raises(SnapshotUnreadable):
            NO_KEYS.open(NO_KEYS.seal(bytes([number]) + b"[[]]", COVER), COVER)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("stored data was executed",)


def test_stored_code_is_never_run() -> None:
    """A pickle in place of the JSON is unreadable, and nothing in it runs."""
    for number in (COMPACT, PLAIN):
        with pytest.raises(SnapshotUnreadable):
            NO_KEYS.open(NO_KEYS.seal(bytes([number]) + pickle.dumps(_Bomb()), COVER), COVER)


@pytest.mark.parametrize(
    "value",
    [
        {"provider": "tests.never", "component_type": "tool", "config": {}},
        {"py/object": "tests.never.Bomb", "py/reduce": []},
        {"lc": 1, "type": "constructor", "id": ["tests", "never"], "kwargs": {}},
        {"__class__": "tests.never.Bomb", "__reduce__": ["os.system", ["false"]]},
        {"$type": "tests.never.Bomb, tests"},
    ],
)
def test_what_names_a_class_is_data(value: Any) -> None:
    """Where it is free data it comes back as it was, elsewhere it is unreadable; nothing is imported."""
    assert from_json_text(to_json_text(value)) == value
    for body in ([[value], {}], [[["u", value]], {}], [[["c", [value]]], {}], value):
        opened = NO_KEYS.open(NO_KEYS.seal(to_body(body), COVER), COVER)
        with pytest.raises(SnapshotUnreadable):
            messages_of(opened[0] if isinstance(opened, list) else opened)
    assert "tests.never" not in sys.modules


@pytest.mark.parametrize(
    "value",
    [
        None, 1, "x", {}, [], [1], [[], []], [[], {}, 1], [{}], [["u", "x"]], [[["u"]]], [[["u", 1]]],
        [[["x", "y"]]], [[["a", "t", None]]], [[["a", "t", "r", "yes"]]], [[["c", [["i", "n"]]]]],
        [[["c", [["i", "n", {}]]]]], [[["c", [], "t", "r", "more"]]], [[["c", [], 5]]], [[["r", ["x"]]]],
        [[["r", [["i", "n", None]]]]], [[{"type": "u", "__class__": "os.system"}]],
    ],
)  # fmt: skip
def test_a_wrong_shape_is_unreadable(value: Any) -> None:
    """JSON that is no turn is unreadable, never another error."""
    with pytest.raises(SnapshotUnreadable):
        messages_of(value)


@pytest.mark.parametrize(
    "rest",
    [
        {"i": 5}, {"a": "odd"}, {"q": "x"}, {"u": [1]}, {"u": [1, 2, 3]}, {"u": 5}, {"e": []}, {"e": 5},
        {"c": "why"}, {"t": 5}, {"t": ["x"]}, {"s": None},
    ],
)  # fmt: skip
def test_a_wrong_rest_is_unreadable(rest: Any) -> None:
    """A field of the wrong type beside good messages makes the turn unreadable."""
    with pytest.raises(SnapshotUnreadable):
        from_turn_value(_columns(_short_turn()), [[["u", "hi"]], rest])


@pytest.mark.parametrize(
    "value", [{}, {"a": 2**70, "b": -(2**70)}, {"k": "\ud800"}, {"n": [None, True, 0.1, "您", {"x": []}]}]
)
def test_json_text_comes_back_exactly(value: dict[str, Any]) -> None:
    """Metadata is read as it was written: huge integers, lone surrogates, any nesting."""
    assert from_json_text(to_json_text(value)) == value
    to_json_text(value).encode()


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", json.dumps("x"), "[" * 100_000])
def test_json_text_of_no_object_is_unreadable(text: str) -> None:
    """Text that is no JSON object is unreadable."""
    with pytest.raises(SnapshotUnreadable):
        from_json_text(text)
