"""Everything that a store keeps, in pieces that another store can take in."""

import json
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any

from app.domain.checkpoint import Checkpoint
from app.domain.compaction import Note
from app.domain.journal import LoggedFact
from app.domain.session import Session
from app.domain.state import SharedState, StateScope
from app.domain.stats import DayUsage
from app.domain.turn import JsonObject, Turn, TurnStatus, interrupted


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

    def settled(self) -> "SessionDump":
        """Return it as it is stored: what runs has failed, at the time of its start, and holds no key."""
        return replace(self, turns=tuple(_settled(dumped) for dumped in self.turns))

    def is_whole(self) -> bool:
        """Say whether nothing is missing that another part of it refers to."""
        turns = {dumped.turn.turn_id: dumped.turn for dumped in self.turns}
        depths = {turn_id: turn.depth for turn_id, turn in turns.items() if turn.is_committed}
        session = self.session
        return (
            (0 if session.head is None else depths.get(session.head)) == session.depth
            and all(depth == 1 + _depth(turns[turn_id].parent, depths) for turn_id, depth in depths.items())
            and all(turn.parent is None or turn.parent in depths for turn in turns.values())
            and all(note.turn_id in depths for note in self.notes)
            and (session.note is None or session.note in {note.note_id for note in self.notes})
            and all(one.checkpoint.turn_id in {None, *depths} for one in self.checkpoints)
        )


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
    """What belongs to no session, each kind in ascending order (scope; owner, user and day).

    ``totals`` are what has been counted since ever: ``turns``, ``turns_failed``, ``turns_finished``,
    ``prompt_tokens``, ``completion_tokens``, ``response_ms``, one ``ms:<bucket>`` per bucket of
    response times; and ``created`` and ``lifetime_ms`` without the sessions that there are now, which
    count where they are loaded.
    """

    shared: tuple[SharedDump, ...]
    usage: tuple[UsageDump, ...]
    totals: dict[str, int]


def canonical(dump: SessionDump | RestDump) -> bytes:
    """Return the JSON that dumps of the same content have in common, from whatever store, and no others."""
    if isinstance(dump, RestDump):
        # Some stores keep counters of which there is nothing to count any more.
        dump = replace(dump, totals={name: count for name, count in dump.totals.items() if count})
    return json.dumps(dump, default=_plain, sort_keys=True, separators=(",", ":")).encode()


def _settled(dumped: TurnDump) -> TurnDump:
    turn = dumped.turn
    if turn.status is not TurnStatus.RUNNING:
        return dumped
    return TurnDump(replace(interrupted(turn, turn.started_at), binding=None), None)


def _depth(turn_id: str | None, depths: dict[str, int]) -> int:
    return 0 if turn_id is None else depths.get(turn_id, -1)


def _plain(value: Any) -> Any:
    """Return what JSON can hold, for the bytes and the values of ours in a dump."""
    if isinstance(value, bytes):
        return value.hex()
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} in a dump")
    # With its name: what a person said and what a model answered have the same fields.
    return [type(value).__name__, *[getattr(value, name) for name in _names(type(value))]]


@cache
def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))
