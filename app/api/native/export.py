"""A user's data as lines of JSON, to take away.

Each line is an object with a ``kind``. The first is the ``header``, the last the ``end``, which counts
the lines of every other kind: an export without it was cut off.
"""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.native.kinds import describe, to_json
from app.api.native.responses import SessionAnswer
from app.api.native.times import to_optional_time, to_time
from app.domain.checkpoint import Checkpoint
from app.domain.compaction import Note
from app.domain.journal import LoggedFact
from app.domain.stats import UserUsage
from app.domain.turn import AssistantText, ContextMessage, ToolCalls, ToolResults, Turn, UserText
from app.services.export import Exported, OfSession, Unreadable, UserState
from app.services.sessions import SessionView

MEDIA_TYPE = "application/x-ndjson"
FORMAT = "agentpool.user-export"
VERSION = 1
CHUNK_BYTES = 32 * 1024
"""About so much is sent at once, and waits until the client has taken it."""
MS_PER_DAY = 86_400_000

Members = dict[str, Any]


class ExportResponse(StreamingResponse):
    """Sends an export, which is under way until its last line: who has that may have another one."""

    def __init__(
        self, export: AbstractAsyncContextManager[AsyncIterator[Exported]], user_id: str, now_ms: int
    ) -> None:
        # No text of the user's in the file's name: it could be anything.
        headers = {"Content-Disposition": 'attachment; filename="user-export.ndjson"'}
        super().__init__((), media_type=MEDIA_TYPE, headers=headers)
        self._export = export
        self._user_id = user_id
        self._now_ms = now_ms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as under_way:
            pieces = await under_way.enter_async_context(self._export)
            self.body_iterator = to_lines(pieces, self._user_id, self._now_ms, under_way.aclose)
            await super().__call__(scope, receive, send)


async def to_lines(
    pieces: AsyncIterator[Exported], user_id: str, now_ms: int, on_read: Callable[[], Awaitable[None]]
) -> AsyncIterator[bytes]:
    """Yield the export in chunks of whole lines; closing it ends the reading.

    ``on_read`` is called when all has been read, before the last line.
    """
    counts: Counter[str] = Counter()
    chunk = bytearray()

    def add(kind: str, members: Members) -> None:
        chunk.extend(to_json({"kind": kind, **members}) + b"\n")

    add("header", {"format": FORMAT, "version": VERSION, "user_id": user_id, "exported_at": to_time(now_ms)})
    async for piece in pieces:
        kind, members = _describe(piece)
        counts[kind] += 1
        add(kind, members)
        if len(chunk) >= CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    await on_read()
    add("end", {"counts": dict(sorted(counts.items()))})
    yield bytes(chunk)


def _describe(piece: Exported) -> tuple[str, Members]:
    if isinstance(piece, OfSession):
        kind, to_members = _OF_SESSION[type(piece.piece)]
        return kind, {"session_id": piece.session_id, **to_members(piece.piece)}
    kind, to_members = _PIECES[type(piece)]
    return kind, to_members(piece)


def _session(view: SessionView) -> Members:
    session = view.session
    members = SessionAnswer.of(view).model_dump(mode="json", exclude={"live", "state"})
    return members | {"ttl_s": session.ttl_s, "template": session.template, "state": session.state}


def _turn(turn: Turn) -> Members:
    error = turn.error
    return {
        "turn_id": turn.turn_id,
        "parent": turn.parent,
        "status": turn.status.value,
        "agent_id": turn.agent_id,
        "provider": turn.provider,
        "model": turn.model,
        "input": turn.input,
        "reply": turn.reply,
        "messages": [_message(message) for message in turn.messages],
        "usage": _usage(turn.usage),
        "error": None if error is None else {"code": error.code, "detail": error.detail},
        "started_at": to_time(turn.started_at),
        "finished_at": to_optional_time(turn.finished_at),
        "on_branch": turn.on_branch,
    }


def _message(message: ContextMessage) -> Members:
    match message:
        case UserText():
            return {"role": "user", "content": message.text}
        case AssistantText():
            said = {"role": "assistant", "content": message.text, "reasoning": message.reasoning}
            return said | ({"interrupted": True} if message.interrupted else {})
        case ToolCalls():
            calls = [
                {"call_id": call.call_id, "name": call.name, "arguments": call.arguments}
                for call in message.calls
            ]
            return {
                "role": "assistant",
                "content": message.text,
                "reasoning": message.reasoning,
                "calls": calls,
            }
        case ToolResults():
            results = [
                {"call_id": r.call_id, "name": r.name, "content": r.content, "is_error": r.is_error}
                for r in message.results
            ]
            return {"role": "tool", "results": results}


def _checkpoint(checkpoint: Checkpoint) -> Members:
    return {
        "checkpoint_id": checkpoint.checkpoint_id,
        "turn_id": checkpoint.turn_id,
        "label": checkpoint.label,
        "data": checkpoint.data,
        "created_at": to_time(checkpoint.created_at),
        "automatic": checkpoint.automatic,
    }


def _note(note: Note) -> Members:
    return {
        "note_id": note.note_id,
        "turn_id": note.turn_id,
        "summary": note.summary,
        "created_at": to_time(note.created_at),
    }


def _event(logged: LoggedFact) -> Members:
    kind, members = describe(logged.fact)
    return {**members, "type": kind, "number": logged.number, "created_at": to_time(logged.created_at)}


def _user_state(state: UserState) -> Members:
    return {"app_name": state.app_name, "state": state.shared.values}


def _user_usage(usage: UserUsage) -> Members:
    days = [
        {"date": to_time(day.day * MS_PER_DAY)[:10], **_usage(day), "turns": day.turns} for day in usage.days
    ]
    return {"turns": usage.turns, **_usage(usage), "days": days}


def _usage(usage: Any) -> Members:
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}


def _unreadable(unreadable: Unreadable) -> Members:
    if unreadable.session_id is None:
        return {"app_name": unreadable.app_name}
    return {"session_id": unreadable.session_id}


Describe = tuple[str, Callable[[Any], Members]]

_OF_SESSION: dict[type[Any], Describe] = {
    Turn: ("turn", _turn),
    Checkpoint: ("checkpoint", _checkpoint),
    Note: ("note", _note),
    LoggedFact: ("event", _event),
}
_PIECES: dict[type[Any], Describe] = {
    SessionView: ("session", _session),
    UserState: ("user_state", _user_state),
    UserUsage: ("usage", _user_usage),
    Unreadable: ("unreadable", _unreadable),
}
