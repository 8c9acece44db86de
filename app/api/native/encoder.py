"""A turn's events as frames of the native face."""

import json
from collections.abc import Callable
from typing import Any

import orjson

from app.api.errors import problem_members, problem_type
from app.api.exchange import Exchange
from app.api.native.times import to_time
from app.domain.events import (
    MessageCompleted,
    ReasoningDelta,
    TextDelta,
    ToolCalled,
    ToolReturned,
    TurnCancelled,
    TurnEvent,
    TurnFailed,
    TurnFinished,
    TurnStarted,
)

Members = dict[str, Any]


def _started(event: TurnStarted) -> Members:
    return {
        "session_id": event.session_id,
        "agent_id": event.agent_id,
        "provider": event.provider,
        "model": event.model,
        "activation": event.activation,
        "created_at": to_time(event.created_at),
    }


def _text(event: TextDelta | ReasoningDelta | MessageCompleted) -> Members:
    return {"text": event.text}


def _called(event: ToolCalled) -> Members:
    return {"call_id": event.call_id, "name": event.name, "arguments": event.arguments}


def _returned(event: ToolReturned) -> Members:
    return {
        "call_id": event.call_id,
        "name": event.name,
        "content": event.content,
        "is_error": event.is_error,
    }


def _finished(event: TurnFinished) -> Members:
    usage = event.usage
    return {
        "reply": event.reply,
        "finish_reason": event.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
        "head": event.head,
        "message_count": event.message_count,
        "turn_count": event.turn_count,
        "queued_ms": event.queued_ms,
        "duration_ms": event.duration_ms,
    }


def _cancelled(event: TurnCancelled) -> Members:
    return {
        "reason": event.reason,
        "partial_kept": event.partial_kept,
        "head": event.head,
        "message_count": event.message_count,
    }


_KINDS: dict[type[Any], tuple[str, Callable[[Any], Members]]] = {
    TurnStarted: ("turn.started", _started),
    TextDelta: ("text.delta", _text),
    ReasoningDelta: ("reasoning.delta", _text),
    ToolCalled: ("tool.called", _called),
    ToolReturned: ("tool.returned", _returned),
    MessageCompleted: ("message.completed", _text),
    TurnFinished: ("turn.finished", _finished),
    TurnCancelled: ("turn.cancelled", _cancelled),
}
EVENT_TYPES = (*(kind for kind, _ in _KINDS.values()), "turn.failed")


class NativeEncoder:
    """Encodes for one response: a ``turn.failed`` names the request that it answers."""

    face = "native"

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def encode(self, turn_id: str, seq: int, event: TurnEvent) -> bytes:
        if isinstance(event, TurnFailed):
            kind, members = "turn.failed", self._failed(event)
        else:
            kind, to_members = _KINDS[type(event)]
            members = to_members(event)
        data = _to_json({"type": kind, "seq": seq, "turn_id": turn_id, **members})
        return b"id: %s:%d\nevent: %s\ndata: %s\n\n" % (turn_id.encode(), seq, kind.encode(), data)

    def _failed(self, event: TurnFailed) -> Members:
        members = problem_members(event.error, self._exchange)
        del members["type"]
        return {**members, "problem_type": problem_type(event.error.code)}


def _to_json(members: Members) -> bytes:
    try:
        return orjson.dumps(members)
    except TypeError:  # a model's half surrogate pair, say: escaped it is still JSON
        return json.dumps(members, separators=(",", ":")).encode("ascii")
