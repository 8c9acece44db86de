"""Sessions and turns as the contract tests need them, with real ids."""

from dataclasses import replace
from typing import Any
from uuid import UUID

from app.domain.checkpoint import Checkpoint
from app.domain.compaction import Note
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan, Session, expiry
from app.domain.turn import (
    Activation,
    AssistantText,
    CancelReason,
    Turn,
    TurnError,
    TurnStatus,
    Usage,
    UserText,
)
from app.ports import SessionStore

T0 = 1_760_000_000_000
LIFE = LifeSpan(idle_after_s=100, ttl_s=1000, retention_s=500)
BOOT = "boot-1"


class Ids:
    """Makes ids that look like UUIDv7 and sort in the order in which they were made."""

    def __init__(self) -> None:
        self._made = 0

    def __call__(self) -> str:
        self._made += 1
        return str(UUID(int=(0x0199 << 112) | (7 << 76) | (2 << 62) | self._made))


new_id = Ids()


def make_session(session_id: str = "s1", *, owner: str = "", now: int = T0, **fields: Any) -> Session:
    values: dict[str, Any] = {
        "key": SessionKey(owner, session_id),
        "uid": new_id(),
        "app_name": "default",
        "agent_id": "assistant",
        "created_at": now,
        "updated_at": now,
        "last_accessed": now,
        "expires_at": expiry(now, fields.get("ttl_s"), LIFE),
    }
    return Session(**(values | fields))


def make_turn(session: Session, said: str = "hi", answer: str = "Hello Alice!", **fields: Any) -> Turn:
    """Return a finished turn that continues the head of ``session``."""
    started = fields.pop("started_at", T0 + 1000 * (session.depth + 1))
    values: dict[str, Any] = {
        "turn_id": new_id(),
        "parent": session.head,
        "depth": session.depth + 1,
        "status": TurnStatus.FINISHED,
        "input": said,
        "agent_id": "assistant",
        "provider": "openai",
        "model": "gpt-5-mini",
        "activation": Activation.WARM,
        "started_at": started,
        "boot_id": BOOT,
        "finished_at": started + 812,
        "duration_ms": 812,
        "messages": (UserText(said), AssistantText(answer)),
        "reply": answer,
        "finish_reason": "stop",
        "usage": Usage(21, 6),
        "last_seq": 5,
    }
    return Turn(**(values | fields))


def make_checkpoint(**fields: Any) -> Checkpoint:
    values: dict[str, Any] = {"checkpoint_id": new_id(), "turn_id": None, "created_at": T0}
    return Checkpoint(**(values | fields))


def make_note(turn_id: str, summary: str = "They met.", **fields: Any) -> Note:
    values: dict[str, Any] = {
        "note_id": new_id(),
        "turn_id": turn_id,
        "summary": summary,
        "tokens_before": 4000,
        "tokens_after": 200,
        "created_at": T0,
    }
    return Note(**(values | fields))


def running(turn: Turn) -> Turn:
    """Return the start record of ``turn``."""
    return replace(
        turn,
        status=TurnStatus.RUNNING,
        finished_at=None,
        duration_ms=0,
        messages=(),
        reply=None,
        finish_reason=None,
        usage=Usage(),
        last_seq=0,
    )


def failed(turn: Turn) -> Turn:
    return replace(
        turn,
        status=TurnStatus.FAILED,
        messages=(UserText(turn.input),),
        reply=None,
        finish_reason=None,
        error=TurnError("MODEL_UNAVAILABLE", "The model does not answer.", 1.5),
    )


def dropped(turn: Turn) -> Turn:
    return replace(
        turn,
        status=TurnStatus.CANCELLED,
        messages=(UserText(turn.input),),
        reply=None,
        finish_reason=None,
        cancel_reason=CancelReason.ROLLBACK,
    )


async def stored_session(store: SessionStore, session_id: str = "s1", **fields: Any) -> Session:
    session = make_session(session_id, **fields)
    await store.create_session(session)
    return session


async def current(store: SessionStore, session: Session) -> Session:
    """Return the record of ``session`` as it is now."""
    found = await store.find_session(session.key)
    assert found is not None
    return found


async def extend(
    store: SessionStore, session: Session, count: int, **fields: Any
) -> tuple[Session, list[Turn]]:
    """Commit ``count`` turns one after the other; return the session then and the turns."""
    turns = []
    for number in range(count):
        turn = make_turn(session, f"question {number}", f"answer {number}", **fields)
        session = await store.commit_turn(session, turn)
        turns.append(turn)
    return session, turns
