"""How turns and sessions become bytes, which ``sealing`` seals.

A turn's body is one format byte and JSON: ``[messages, rest]``. ``messages`` has
one short list per message, tagged by its first item; ``rest`` only what can neither
be derived from the messages nor is equal to its default. Nothing that was stored is
ever imported or executed.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from app.domain.branch import HeadCause
from app.domain.errors import SnapshotUnreadable
from app.domain.journal import Compacted, Fact, HeadChanged, StateChanged
from app.domain.session import Session
from app.domain.turn import (
    Activation,
    AssistantText,
    CancelReason,
    ContextMessage,
    JsonObject,
    ToolCall,
    ToolCalls,
    ToolResult,
    ToolResults,
    Turn,
    TurnError,
    TurnStatus,
    Usage,
    UserText,
    text_of,
)

COMPACT = 1
"""Written and read by orjson."""
PLAIN = 2
"""Escaped JSON of the standard library, for what orjson refuses: lone surrogates, huge integers."""

SESSION_FORMAT = 1


class TurnColumns(NamedTuple):
    """What a store keeps of a turn beside its bytes, to search by."""

    turn_id: str
    parent: str | None
    depth: int
    status: TurnStatus
    kept: bool
    agent_id: str
    provider: str
    model: str
    boot_id: str
    started_at: int
    finished_at: int | None


def to_turn_body(turn: Turn) -> bytes:
    """Return the format byte and the JSON of what ``TurnColumns`` does not hold."""
    rest = _rest_of(turn)
    messages = [_from_message(message) for message in turn.messages]
    return to_body([messages, rest] if rest else [messages])


def to_body(value: Any) -> bytes:
    """Return the format byte and the JSON of ``value``, for ``Sealer.seal``."""
    try:
        return bytes([COMPACT]) + orjson.dumps(value)
    except TypeError:
        return bytes([PLAIN]) + json.dumps(value, separators=(",", ":")).encode()


def from_turn_value(columns: TurnColumns, value: Any, *, on_branch: bool = False) -> Turn:
    """Return the turn that ``Sealer.open`` gave as ``value``.

    Raises:
        SnapshotUnreadable: the value has not the shape of a turn.
    """
    messages = messages_of(value)
    try:
        rest = value[1] if len(value) > 1 else {}
        return Turn(
            **columns._asdict(), **_from_rest(columns, messages, rest), messages=messages, on_branch=on_branch
        )
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise SnapshotUnreadable(turn_id=columns.turn_id) from error


def messages_of(value: Any) -> tuple[ContextMessage, ...]:
    """Return the messages of the turn that ``Sealer.open`` gave as ``value``.

    Raises:
        SnapshotUnreadable: the value has not the shape of a turn.
    """
    match value:
        case [list(messages)] | [list(messages), dict()]:
            return tuple([_to_message(message) for message in messages])
    raise SnapshotUnreadable


def to_json_text(value: JsonObject) -> str:
    """Return ``value`` as JSON text that ``from_json_text`` gives back exactly."""
    return to_body(value)[1:].decode()


def from_json_text(text: str) -> JsonObject:
    """Return the object that ``to_json_text`` wrote.

    Raises:
        SnapshotUnreadable: it is not a JSON object.
    """
    try:
        # Not orjson: it reads integers of more than 64 bits as floats.
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise SnapshotUnreadable from error
    if not isinstance(value, dict):
        raise SnapshotUnreadable
    return value


def to_fact_value(fact: Fact) -> list[Any]:
    """Return what ``from_fact_value`` reads."""
    match fact:
        case StateChanged(patch):
            return ["s", patch]
        case HeadChanged(cause, previous, head, checkpoint_id):
            return ["h", cause.value, previous, head, checkpoint_id]
        case Compacted(note_id, summarised):
            return ["c", note_id, summarised]


def from_fact_value(value: Any) -> Fact:
    """Return the fact.

    Raises:
        SnapshotUnreadable: the value has not the shape of one.
    """
    match value:
        case ["s", dict(patch)]:
            return StateChanged(patch)
        case ["h", str(cause), previous, head, checkpoint_id] if cause in list(HeadCause):
            return HeadChanged(HeadCause(cause), previous, head, checkpoint_id)
        case ["c", str(note_id), str(summarised)]:
            return Compacted(note_id, summarised)
    raise SnapshotUnreadable


def session_seal(session: Session, texts: Sequence[str | bytes | None], numbers: Sequence[int | None]) -> int:
    """Return the number that vouches for a session's row: its format and a CRC-32 of every column.

    ``texts`` are its title and its JSON columns as they are stored: of what is encrypted no
    checksum may tell. ``numbers`` are those that tell where its states are.
    """
    fields = [
        *session.key, session.uid, session.app_name, session.agent_id, session.created_at, session.updated_at,
        session.last_accessed, session.expires_at, session.user_id, session.window_id,
        session.provider, session.model, *texts, session.ttl_s, session.archived, session.marked_idle,
        session.head, session.note, session.depth, session.rev, session.state_rev, *numbers,
    ]  # fmt: skip
    # Bytes are no JSON: "default" puts their checksum in their place.
    return SESSION_FORMAT << 32 | crc32(orjson.dumps(fields, default=crc32))


def _from_message(message: ContextMessage) -> list[Any]:
    match message:
        case UserText(text):
            return ["u", text]
        case AssistantText(text, reasoning, interrupted):
            return _trimmed(["a", text, reasoning, int(interrupted)], 2)
        case ToolCalls(calls, text, reasoning):
            listed = [[call.call_id, call.name, call.arguments] for call in calls]
            return _trimmed(["c", listed, text, reasoning], 2)
        case ToolResults(results):
            return ["r", [_trimmed([r.call_id, r.name, r.content, int(r.is_error)], 3) for r in results]]


def _trimmed(values: list[Any], least: int) -> list[Any]:
    while len(values) > least and not values[-1]:
        values.pop()
    return values


def _to_message(raw: Any) -> ContextMessage:
    match raw:
        case ["u", str(text)]:
            return UserText(text)
        case ["a", str(text)]:
            return AssistantText(text)
        case ["a", str(text), str(reasoning)]:
            return AssistantText(text, reasoning)
        case ["a", str(text), str(reasoning), int(interrupted)]:
            return AssistantText(text, reasoning, bool(interrupted))
        case ["c", list(calls), *texts] if len(texts) <= 2 and all(isinstance(text, str) for text in texts):
            return ToolCalls(tuple(_to_call(call) for call in calls), *texts)
        case ["r", list(results)]:
            return ToolResults(tuple(_to_result(result) for result in results))
    raise SnapshotUnreadable


def _to_call(raw: Any) -> ToolCall:
    match raw:
        case [str(call_id), str(name), str(arguments)]:
            return ToolCall(call_id, name, arguments)
    raise SnapshotUnreadable


def _to_result(raw: Any) -> ToolResult:
    match raw:
        case [str(call_id), str(name), str(content)]:
            return ToolResult(call_id, name, content)
        case [str(call_id), str(name), str(content), int(is_error)]:
            return ToolResult(call_id, name, content, bool(is_error))
    raise SnapshotUnreadable


def _rest_of(turn: Turn) -> dict[str, Any]:
    error = turn.error
    usage = turn.usage
    written = {
        "i": (turn.input, _default_input(turn.messages)),
        "r": (turn.reply, _default_reply(turn.messages)),
        "f": (turn.finish_reason, _default_finish_reason(turn.status)),
        "a": (turn.activation.value, Activation.WARM.value),
        "q": (turn.queued_ms, 0),
        "d": (turn.duration_ms, 0),
        "u": ([usage.prompt_tokens, usage.completion_tokens], [0, 0]),
        "e": (error and [error.code, error.detail, error.retry_after_s], None),
        "c": (turn.cancel_reason and turn.cancel_reason.value, None),
        "t": (list(turn.tool_seqs), []),
        "s": (turn.last_seq, 0),
    }
    return {key: value for key, (value, default) in written.items() if value != default}


def _from_rest(
    columns: TurnColumns, messages: tuple[ContextMessage, ...], rest: dict[str, Any]
) -> dict[str, Any]:
    said = rest["i"] if "i" in rest else _default_input(messages)
    if not isinstance(said, str):
        raise SnapshotUnreadable(turn_id=columns.turn_id)
    cancel_reason = rest.get("c")
    prompt_tokens, completion_tokens = rest.get("u", (0, 0))
    return {
        "input": said,
        "reply": rest["r"] if "r" in rest else _default_reply(messages),
        "finish_reason": rest["f"] if "f" in rest else _default_finish_reason(columns.status),
        "activation": Activation(rest.get("a", Activation.WARM)),
        "queued_ms": int(rest.get("q", 0)),
        "duration_ms": int(rest.get("d", 0)),
        "usage": Usage(int(prompt_tokens), int(completion_tokens)),
        "error": TurnError(*rest["e"]) if "e" in rest else None,
        "cancel_reason": None if cancel_reason is None else CancelReason(cancel_reason),
        "tool_seqs": tuple(map(int, rest.get("t", ()))),
        "last_seq": int(rest.get("s", 0)),
    }


def _default_input(messages: tuple[ContextMessage, ...]) -> str | None:
    return next((message.text for message in messages if isinstance(message, UserText)), None)


def _default_reply(messages: tuple[ContextMessage, ...]) -> str | None:
    return text_of(messages) if messages else None


def _default_finish_reason(status: TurnStatus) -> str | None:
    return "stop" if status is TurnStatus.FINISHED else None
