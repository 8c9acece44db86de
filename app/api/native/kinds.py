"""The kinds of events: what each is called and what it says, in a stream and in a session's story."""

import json
from collections.abc import Callable
from typing import Any

import orjson

from app.api.errors import failure_members
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
from app.domain.journal import Compacted, Fact, HeadChanged, StateChanged

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


def _failed(event: TurnFailed) -> Members:
    return as_event(failure_members(event.error))


def _state_changed(fact: StateChanged) -> Members:
    return {"state": fact.patch}


def _head_moved(fact: HeadChanged) -> Members:
    members: Members = {"cause": fact.cause, "previous": fact.previous, "head": fact.head}
    return members if fact.checkpoint_id is None else members | {"checkpoint_id": fact.checkpoint_id}


def _compacted(fact: Compacted) -> Members:
    return {"note_id": fact.note_id, "through": fact.summarised}


_OF_TURNS: dict[type[Any], tuple[str, Callable[[Any], Members]]] = {
    TurnStarted: ("turn.started", _started),
    TextDelta: ("text.delta", _text),
    ReasoningDelta: ("reasoning.delta", _text),
    ToolCalled: ("tool.called", _called),
    ToolReturned: ("tool.returned", _returned),
    MessageCompleted: ("message.completed", _text),
    TurnFinished: ("turn.finished", _finished),
    TurnFailed: ("turn.failed", _failed),
    TurnCancelled: ("turn.cancelled", _cancelled),
}
_OF_FACTS: dict[type[Any], tuple[str, Callable[[Any], Members]]] = {
    StateChanged: ("state.changed", _state_changed),
    HeadChanged: ("head.moved", _head_moved),
    Compacted: ("session.compacted", _compacted),
}
_KINDS = _OF_TURNS | _OF_FACTS
EVENT_TYPES = tuple(name for name, _ in _OF_TURNS.values())
"""The types of a turn's events."""

CLASS_OF_TYPE: dict[str, type] = {name: kind for kind, (name, _) in _KINDS.items()}
"""Every type that a session's story knows, and what it is inside."""


def describe(event: TurnEvent | Fact) -> tuple[str, Members]:
    """Return the event's type and what it says.

    A ``turn.failed`` says what is true for everybody: nothing of a request.
    """
    name, to_members = _KINDS[type(event)]
    return name, to_members(event)


def as_event(problem: Members) -> Members:
    """Return the members of a problem document as those of an event, whose own ``type`` says what it is."""
    members = dict(problem)
    return {"problem_type": members.pop("type"), **members}


def to_json(members: Members) -> bytes:
    try:
        return orjson.dumps(members)
    except TypeError:  # a model's half surrogate pair, say: escaped it is still JSON
        return json.dumps(members, separators=(",", ":")).encode("ascii")
