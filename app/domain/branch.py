"""Where a session's head may be moved to, and what is remembered of such moves."""

from dataclasses import dataclass
from enum import StrEnum

ROOT = "root"
"""What names the place before the first turn where a turn's id is asked for."""


@dataclass(frozen=True, slots=True)
class ToTurn:
    """To a committed turn, of whatever branch; ``None``: before the first turn."""

    turn_id: str | None


@dataclass(frozen=True, slots=True)
class Back:
    """Back by so many turns of the current branch."""

    turns: int


@dataclass(frozen=True, slots=True)
class ToCheckpoint:
    """To the turn and the state that a checkpoint names."""

    checkpoint_id: str


HeadTarget = ToTurn | Back | ToCheckpoint


class HeadCause(StrEnum):
    REWIND = "rewind"
    RESTORE = "restore"


def cause_of(target: HeadTarget) -> HeadCause:
    return HeadCause.RESTORE if isinstance(target, ToCheckpoint) else HeadCause.REWIND
