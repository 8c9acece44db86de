"""Events as frames: names, members, and nothing that breaks a line."""

import json

import pytest

from app.api.exchange import Exchange
from app.api.native.encoder import NativeEncoder
from app.api.native.times import to_time
from app.domain.events import (
    MessageCompleted,
    ReasoningDelta,
    TextDelta,
    ToolCalled,
    ToolReturned,
    TurnCancelled,
    TurnFailed,
    TurnFinished,
    TurnStarted,
)
from app.domain.turn import Activation, CancelReason, TurnError, Usage

TURN = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"
EXCHANGE = Exchange(path="/chat/stream", request_id="r1", session_id="s", turn_id=TURN)


def decode(frame: bytes) -> dict[str, str]:
    assert frame.endswith(b"\n\n")
    lines = frame[:-2].decode().split("\n")
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize(
    ("event", "kind", "members"),
    [
        (
            TurnStarted("s", "assistant", "demo", "demo", Activation.WARM, 1_800_000_000_007),
            "turn.started",
            {
                "session_id": "s",
                "agent_id": "assistant",
                "provider": "demo",
                "model": "demo",
                "activation": "warm",
                "created_at": "2027-01-15T08:00:00.007Z",
            },
        ),
        (TextDelta("你好"), "text.delta", {"text": "你好"}),
        (ReasoningDelta("hm"), "reasoning.delta", {"text": "hm"}),
        (
            ToolCalled("c1", "add", {"a": 1}),
            "tool.called",
            {"call_id": "c1", "name": "add", "arguments": {"a": 1}},
        ),
        (
            ToolReturned("c1", "add", "3", False),
            "tool.returned",
            {"call_id": "c1", "name": "add", "content": "3", "is_error": False},
        ),
        (MessageCompleted("你好"), "message.completed", {"text": "你好"}),
        (
            TurnFinished("r", "stop", Usage(2, 3), TURN, 4, 2, 0, 9),
            "turn.finished",
            {
                "reply": "r",
                "finish_reason": "stop",
                "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
                "head": TURN,
                "message_count": 4,
                "turn_count": 2,
                "queued_ms": 0,
                "duration_ms": 9,
            },
        ),
        (
            TurnCancelled(CancelReason.USER, True, None, 0),
            "turn.cancelled",
            {"reason": "user", "partial_kept": True, "head": None, "message_count": 0},
        ),
        (
            TurnFailed(TurnError("MODEL_RATE_LIMITED", "Slow down.", 7)),
            "turn.failed",
            {
                "problem_type": "/problems/model-rate-limited",
                "title": "The model's provider limits requests",
                "status": 429,
                "detail": "Slow down.",
                "instance": "/chat/stream",
                "code": "MODEL_RATE_LIMITED",
                "request_id": "r1",
                "session_id": "s",
                "retry_after_s": 7,
            },
        ),
    ],
)
def test_each_event_as_the_contract_has_it(event, kind: str, members: dict) -> None:
    """Id, event and one line of data that repeats type, seq and turn_id."""
    fields = decode(NativeEncoder(EXCHANGE).encode(TURN, 3, event))
    assert fields["id"] == f"{TURN}:3"
    assert fields["event"] == kind
    assert json.loads(fields["data"]) == {"type": kind, "seq": 3, "turn_id": TURN, **members}


@pytest.mark.parametrize(
    "text", ["a\n\nevent: turn.finished\ndata: {}", "\r\n", "\u2028\u2029", "\0", "\ud800"]
)
def test_no_text_breaks_out_of_its_line(text: str) -> None:
    """Whatever the model says stays inside one line of JSON, half a surrogate pair too."""
    frame = NativeEncoder(EXCHANGE).encode(TURN, 1, TextDelta(text))
    assert frame.count(b"\n") == 4
    assert b"\r" not in frame
    assert json.loads(decode(frame)["data"])["text"] == text


def test_times_have_milliseconds_and_z() -> None:
    """RFC 3339 in UTC, also for whole seconds and before 1970."""
    assert to_time(0) == "1970-01-01T00:00:00.000Z"
    assert to_time(1) == "1970-01-01T00:00:00.001Z"
    assert to_time(-1) == "1969-12-31T23:59:59.999Z"
