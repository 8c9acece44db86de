"""What happens in a turn: immutable facts, in the order in which they happened.

A turn's log numbers them 1, 2, 3, …; the first is ``TurnStarted`` and exactly one of
``TurnFinished``, ``TurnFailed``, ``TurnCancelled`` is the last. Faces only encode them.
"""

from dataclasses import dataclass
from typing import Any

from app.domain.turn import Activation, CancelReason, TurnError, Usage


@dataclass(frozen=True, slots=True)
class TurnStarted:
    session_id: str
    agent_id: str
    provider: str
    model: str
    activation: Activation
    created_at: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCalled:
    call_id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolReturned:
    call_id: str
    name: str
    content: str
    is_error: bool


@dataclass(frozen=True, slots=True)
class MessageCompleted:
    """The whole answer: all ``TextDelta`` joined."""

    text: str


@dataclass(frozen=True, slots=True)
class TurnFinished:
    reply: str
    finish_reason: str
    usage: Usage
    head: str
    message_count: int
    turn_count: int
    queued_ms: int
    duration_ms: int


@dataclass(frozen=True, slots=True)
class TurnFailed:
    error: TurnError


@dataclass(frozen=True, slots=True)
class TurnCancelled:
    reason: CancelReason
    partial_kept: bool
    head: str | None
    message_count: int


TurnEvent = (
    TurnStarted
    | TextDelta
    | ReasoningDelta
    | ToolCalled
    | ToolReturned
    | MessageCompleted
    | TurnFinished
    | TurnFailed
    | TurnCancelled
)
TerminalEvent = TurnFinished | TurnFailed | TurnCancelled
