"""Everything that a store keeps, in pieces that another store can take in."""

from dataclasses import dataclass

from app.domain.checkpoint import Checkpoint
from app.domain.compaction import Note
from app.domain.journal import LoggedFact
from app.domain.session import Session
from app.domain.state import SharedState, StateScope
from app.domain.stats import DayUsage
from app.domain.turn import JsonObject, Turn


@dataclass(frozen=True, slots=True)
class TurnDump:
    """A turn, with its ``binding``; ``state`` is the session's at its commit, ``None`` if it never was."""

    turn: Turn
    state: JsonObject | None


@dataclass(frozen=True, slots=True)
class CheckpointDump:
    checkpoint: Checkpoint
    state: JsonObject


@dataclass(frozen=True, slots=True)
class SessionDump:
    """A session and all that belongs to it.

    Turns, notes and checkpoints are in the order of their ids, facts in that of their numbers.
    ``root_state`` is what it was created with.
    """

    session: Session
    root_state: JsonObject
    turns: tuple[TurnDump, ...] = ()
    notes: tuple[Note, ...] = ()
    facts: tuple[LoggedFact, ...] = ()
    checkpoints: tuple[CheckpointDump, ...] = ()


@dataclass(frozen=True, slots=True)
class SharedDump:
    scope: StateScope
    shared: SharedState


@dataclass(frozen=True, slots=True)
class UsageDump:
    """What turns of one user took on one day."""

    owner: str
    user_id: str
    usage: DayUsage


@dataclass(frozen=True, slots=True)
class RestDump:
    """What belongs to no session, each kind in ascending order.

    ``totals`` are what has been counted since ever, without the sessions there are now:
    ``created``, ``lifetime_ms``, ``turns``, ``turns_failed``, ``turns_finished``, ``prompt_tokens``,
    ``completion_tokens``, ``response_ms`` and one ``ms:<bucket>`` per bucket of response times.
    """

    shared: tuple[SharedDump, ...]
    usage: tuple[UsageDump, ...]
    totals: dict[str, int]
