"""What happens to a session outside its turns, and how its whole story is put in order.

A session's story is made of entries: turns, and facts that were logged between them.
Entries are in the order of (time, tie), the time being that at which they began.
"""

from dataclasses import dataclass
from typing import NamedTuple

from app.domain.branch import HeadCause
from app.domain.turn import JsonObject, Turn


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The session's state was patched."""

    patch: JsonObject


@dataclass(frozen=True, slots=True)
class HeadChanged:
    """The session's head was moved by hand."""

    cause: HeadCause
    previous: str | None
    head: str | None
    checkpoint_id: str | None = None


@dataclass(frozen=True, slots=True)
class Compacted:
    """A summary was made that stands for the path up to ``summarised``."""

    note_id: str
    summarised: str


Fact = StateChanged | HeadChanged | Compacted


@dataclass(frozen=True, slots=True)
class LoggedFact:
    """``number`` counts a session's facts from 1; ``created_at`` is never before that of an earlier one."""

    number: int
    created_at: int
    fact: Fact


Entry = Turn | LoggedFact


class Position(NamedTuple):
    """A place between entries; ``tie`` is ``tie_of`` one, "" is before and ``LAST`` behind all."""

    time_ms: int
    tie: str = ""


LAST = "~"


def tie_of(entry: Entry) -> str:
    """Return what orders entries of the same millisecond: facts by number, then turns by id."""
    return f"!{entry.number:016d}" if isinstance(entry, LoggedFact) else entry.turn_id


def position_of(entry: Entry) -> Position:
    time_ms = entry.created_at if isinstance(entry, LoggedFact) else entry.started_at
    return Position(time_ms, tie_of(entry))
