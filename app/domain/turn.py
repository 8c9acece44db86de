"""A turn: one input and everything until it ends; immutable once recorded.

Like a commit it has a parent, and the path from the root to a turn is the
model context after it. Only *committed* turns (finished, or cancelled with the
partial answer kept) are ever on a path.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from app.domain.idempotency import Binding

MESSAGES_PER_TURN = 2  # what ``message_count`` counts: the input and the answer


class TurnStatus(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Activation(StrEnum):
    """Where a turn's live agent came from."""

    NEW = "new"  # nothing to restore
    WARM = "warm"  # it was in the pool
    RESTORED = "restored"  # rebuilt from the store


class CancelReason(StrEnum):
    USER = "user"
    INTERRUPT = "interrupt"
    ROLLBACK = "rollback"
    DRAIN = "drain"
    DISCONNECT = "disconnect"
    DELETED = "deleted"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that the provider counted for one turn."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class UserText:
    """What the person said."""

    text: str


@dataclass(frozen=True, slots=True)
class AssistantText:
    """What the model answered. ``interrupted``: it was cut off by a cancel and kept."""

    text: str
    reasoning: str = ""
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """``arguments`` is the JSON text as the model wrote it."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """The model asked for tools; ``text`` is what it said before it did."""

    calls: tuple[ToolCall, ...]
    text: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class ToolResult:
    call_id: str
    name: str
    content: str
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class ToolResults:
    """One result for every call of the ``ToolCalls`` before it."""

    results: tuple[ToolResult, ...]


ContextMessage = UserText | AssistantText | ToolCalls | ToolResults


@dataclass(frozen=True, slots=True)
class TurnError:
    """Why a turn failed, as it is stored and shown.

    ``outcome_unknown``: a commit was under way and may have happened; only ever shown live.
    """

    code: str
    detail: str
    retry_after_s: float | None = None
    outcome_unknown: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One row of a session's tree. Times are milliseconds since the epoch.

    ``depth`` counts the turns from the root to this one, itself included.
    ``messages`` are in model-context form: those of a committed turn are on the
    path; those of a failed one only tell what happened.
    ``tool_seqs`` holds the sequence numbers of its tool events in order and
    ``last_seq`` that of the terminal event, so that a replay from the store
    numbers events as the live stream did.
    ``binding`` is written with the turn, and not read back with it: ``find_bound`` finds the turn.
    """

    turn_id: str
    parent: str | None
    depth: int
    status: TurnStatus
    input: str
    agent_id: str
    provider: str
    model: str
    activation: Activation
    started_at: int
    boot_id: str
    finished_at: int | None = None
    queued_ms: int = 0
    duration_ms: int = 0
    messages: tuple[ContextMessage, ...] = ()
    reply: str | None = None
    finish_reason: str | None = None
    usage: Usage = Usage()
    error: TurnError | None = None
    cancel_reason: CancelReason | None = None
    kept: bool = False
    tool_seqs: tuple[int, ...] = ()
    last_seq: int = 0
    binding: Binding | None = None
    on_branch: bool = False  # computed when read: is it on the path to the session's head?

    @property
    def is_committed(self) -> bool:
        return self.status is TurnStatus.FINISHED or (self.status is TurnStatus.CANCELLED and self.kept)


@dataclass(frozen=True, slots=True)
class BoundTurn:
    """A committed turn as its idempotency key finds it."""

    session_id: str
    fingerprint: bytes
    turn: Turn


@dataclass(frozen=True, slots=True)
class CancelOrder:
    """Which turns of a session are to end: that of ``turn_id``, ``all``, or the one that is first."""

    reason: CancelReason
    keep_partial: bool
    turn_id: str | None = None
    all: bool = False


@dataclass(frozen=True, slots=True)
class TurnPage:
    turns: tuple[Turn, ...]
    total: int | None
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a live agent hands back at the end of a good turn.

    ``messages`` is everything the turn added to the context, the input first.
    """

    messages: tuple[ContextMessage, ...]
    usage: Usage
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What a model made of a path; tokens are estimates of the context before and after."""

    text: str
    tokens_before: int
    tokens_after: int
    usage: Usage


INTERRUPTED = TurnError("INTERRUPTED", "The process died while the turn ran.")


def interrupted(turn: Turn, now: int) -> Turn:
    """Return the start record ``turn`` of a dead process as a failed turn; its events are 1 and 2."""
    return replace(
        turn,
        status=TurnStatus.FAILED,
        error=INTERRUPTED,
        finished_at=max(now, turn.started_at),
        tool_seqs=(),
        last_seq=2,
    )


def text_of(messages: tuple[ContextMessage, ...]) -> str:
    """Return all that the model said in ``messages``, in order, joined."""
    return "".join(m.text for m in messages if isinstance(m, AssistantText | ToolCalls))


JsonObject = dict[str, Any]
