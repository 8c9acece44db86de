"""What each write makes of a record: the same in every store, decided without I/O."""

from dataclasses import replace

from app.domain.errors import HeadMoved
from app.domain.session import LifeSpan, Session, SessionQuery
from app.domain.turn import Turn, TurnError, TurnStatus

MS_PER_DAY = 86_400_000
TOTAL_LIMIT = 1000
"""Totals that have no index to count are exact up to here."""

_INTERRUPTED = TurnError("INTERRUPTED", "The process died while the turn ran.")


def check_committed(turn: Turn) -> None:
    """Refuse to commit a turn that has not ended well.

    Raises:
        ValueError: a mistake in our own code.
    """
    if not turn.is_committed:
        raise ValueError(f"a turn that is {turn.status} cannot become the head")


def check_dropped(turn: Turn) -> None:
    """Refuse to record a turn beside the tree that belongs on it, or has not ended.

    Raises:
        ValueError: a mistake in our own code.
    """
    if turn.is_committed or turn.status is TurnStatus.RUNNING:
        raise ValueError(f"a turn that is {turn.status} cannot be recorded beside the tree")


def check_head(session: Session, turn: Turn) -> None:
    """Refuse a turn that does not continue the head.

    Raises:
        HeadMoved: the session has moved on.
        ValueError: the depth does not follow from the parent's, a mistake in our own code.
    """
    if session.head != turn.parent:
        raise HeadMoved(session_id=session.key.session_id, turn_id=turn.turn_id)
    if turn.depth != session.depth + 1:
        raise ValueError(f"depth {turn.depth} does not follow {session.depth}")


def after_commit(session: Session, turn: Turn, life: LifeSpan) -> Session:
    """Return the session with ``turn`` as its head."""
    now = end_of(turn)
    return replace(
        session.touched(now, life),
        head=turn.turn_id,
        depth=turn.depth,
        updated_at=max(now, session.updated_at),
    )


def interrupted(turn: Turn, now: int) -> Turn:
    """Return the start record ``turn`` of a dead process as a failed turn; its events are 1 and 2."""
    return replace(
        turn,
        status=TurnStatus.FAILED,
        error=_INTERRUPTED,
        finished_at=max(now, turn.started_at),
        tool_seqs=(),
        last_seq=2,
    )


def end_of(turn: Turn) -> int:
    return turn.started_at if turn.finished_at is None else turn.finished_at


def counts_of(turn: Turn) -> dict[str, int]:
    """Return what an ended turn adds to the maintained counters."""
    return {
        "turns": 1,
        "turns_failed": int(turn.status is TurnStatus.FAILED),
        "prompt_tokens": turn.usage.prompt_tokens,
        "completion_tokens": turn.usage.completion_tokens,
        "duration_ms": turn.duration_ms,
    }


def day_of(turn: Turn) -> int:
    """Return the day on which the turn ended: days since the epoch, in UTC."""
    return end_of(turn) // MS_PER_DAY


def purge_line(now: int, life: LifeSpan) -> int | None:
    """Return the expiry time up to which sessions are removed, ``None`` for no removal."""
    return now - life.retention_s * 1000 if life.retention_s else None


def idle_line(now: int, life: LifeSpan) -> int | None:
    """Return the time up to which a last activity makes a session idle, ``None`` for never."""
    return now - life.idle_after_s * 1000 if life.idle_after_s else None


def has_exact_total(query: SessionQuery) -> bool:
    return query.window_id is None and query.status is None and query.text is None
