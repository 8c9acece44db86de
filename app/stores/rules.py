"""What each write makes of a record: the same in every store, decided without I/O."""

from dataclasses import replace
from typing import NamedTuple

from app.domain.branch import HeadTarget, ToCheckpoint, cause_of
from app.domain.checkpoint import NAMED_MAX, AutoCheckpoint, Checkpoint
from app.domain.errors import HeadMoved, InvalidInput
from app.domain.journal import HeadChanged
from app.domain.session import LifeSpan, Session, SessionQuery
from app.domain.state import patched_values
from app.domain.turn import JsonObject, Turn, TurnStatus
from app.domain.turn import interrupted as interrupted

MS_PER_DAY = 86_400_000
TOTAL_LIMIT = 1000
"""Totals that have no index to count are exact up to here."""


class Place(NamedTuple):
    """A place in a session's tree: what the record says while the head is there."""

    head: str | None
    depth: int
    note: str | None
    state: JsonObject


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


def after_commit(session: Session, turn: Turn, life: LifeSpan) -> Session:
    """Return the session with ``turn`` as its head."""
    now = end_of(turn)
    updated_at = max(now, session.updated_at)
    return session.touched(now, life, head=turn.turn_id, depth=turn.depth, updated_at=updated_at)


def check_unmoved(current: Session, session: Session, turn_id: str | None = None) -> None:
    """Refuse to go on, with the turn if one is given, from a head that is not the head any more.

    Raises:
        HeadMoved: the session has moved on since ``session`` was read.
    """
    if current.head != session.head:
        raise HeadMoved(session_id=session.key.session_id, turn_id=turn_id)


def check_depth(turn: Turn, parent: Place) -> None:
    """Refuse a turn whose depth does not follow from its parent's.

    Raises:
        ValueError: a mistake in our own code.
    """
    if turn.depth != parent.depth + 1:
        raise ValueError(f"depth {turn.depth} does not follow {parent.depth}")


def check_named(count: int) -> None:
    """Refuse a checkpoint that somebody asked for where ``count`` such exist.

    Raises:
        InvalidInput: that are as many as a session may have.
    """
    if count >= NAMED_MAX:
        raise InvalidInput("checkpoints", f"must be at most {NAMED_MAX} that are not automatic")


def check_back(session: Session, turns: int) -> None:
    """Refuse to go back by more turns than there are.

    Raises:
        InvalidInput: the branch is shorter.
    """
    if turns > session.depth:
        raise InvalidInput("turns", f"must be at most {session.depth}, the turns of this branch")


def at_place(session: Session, place: Place) -> Session:
    """Return the session as a turn finds it that continues ``place``."""
    return _put_at(session, place).with_state(place.state, by_turn=True)


def after_move(session: Session, place: Place, now: int, life: LifeSpan) -> Session:
    """Return the session after its head was moved to ``place``, which is activity."""
    moved = _put_at(session, place).with_state(place.state).touched(now, life)
    return replace(moved, updated_at=max(now, session.updated_at))


def after_fork(new: Session, place: Place) -> Session:
    """Return the new session as it begins, with the copy of the path to ``place``."""
    return replace(new, head=place.head, depth=place.depth, note=place.note, state=place.state)


def after_patch(session: Session, patch: JsonObject, now: int) -> Session:
    """Return the session after the merge patch of its state.

    Raises:
        InvalidInput: the state would be larger than it may be.
    """
    return replace(
        session,
        state=patched_values(session.state, patch),
        rev=session.rev + 1,
        state_rev=session.state_rev + 1,
        updated_at=max(now, session.updated_at),
    )


def head_changed(session: Session, target: HeadTarget, place: Place) -> HeadChanged:
    """Return what to log when the head of ``session`` is moved to ``place``."""
    checkpoint_id = target.checkpoint_id if isinstance(target, ToCheckpoint) else None
    return HeadChanged(cause_of(target), session.head, place.head, checkpoint_id)


def fact_time(session: Session, now: int) -> int:
    """Return the time of what is done by hand at ``now``: behind all that the session has seen.

    Also in the same millisecond: events of one time are told with facts first, and nothing may
    ever come to stand before what has been told. The record's ``updated_at`` takes this time, and
    no turn starts before that.
    """
    return max(now, session.last_accessed + 1, session.updated_at)


def automatic_checkpoint(wanted: AutoCheckpoint, turn: Turn) -> Checkpoint:
    """Return the checkpoint that is made with the commit of ``turn``."""
    return Checkpoint(
        checkpoint_id=wanted.checkpoint_id, turn_id=turn.turn_id, created_at=end_of(turn), automatic=True
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


def _put_at(session: Session, place: Place) -> Session:
    return replace(session, head=place.head, depth=place.depth, note=place.note)
