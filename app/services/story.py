"""A session's story: the events of its turns and the facts between them, in the order of time.

Turns do not overlap, and what is logged during one lies between its first event, which has
the time of its start, and its others, which were stored at its end and have that time. So a
page needs the entries around its position, and one turn more to know that none is missing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Final

from app.domain.errors import InvalidInput
from app.domain.events import TurnEvent
from app.domain.journal import LAST, Entry, Fact, LoggedFact, Position, position_of, tie_of
from app.domain.replay import replay
from app.domain.session import Session
from app.domain.turn import Turn
from app.ports import SessionStore

CHUNK_MAX = 200
EVENTS_PER_TURN = 3  # of nearly every turn at least; only a guess at how many entries make a page
_OF_TURN: Final = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}):([0-9]{1,9})")
_OF_FACT: Final = re.compile(r"fact:([0-9]{1,15}):([0-9]{1,15})")


@dataclass(frozen=True, slots=True)
class StoryEvent:
    """``id`` names it within its session; ``turn_id`` and ``seq`` are those of a turn's event."""

    id: str
    created_at: int
    turn_id: str | None
    seq: int | None
    event: TurnEvent | Fact


Key = tuple[float, str, int]
"""The order of events: time, then the tie of the entry, then the number within it."""

_FIRST: Final[Key] = (-inf, "", 0)
_END: Final[Key] = (inf, "", 0)


@dataclass(frozen=True, slots=True)
class Asked:
    """Which events are wanted: those since a time, of some kinds, not before a floor (``None``: all)."""

    since: int | None = None
    kinds: frozenset[type] | None = None
    floor: Key | None = None

    @property
    def start(self) -> Key:
        since = _FIRST if self.since is None else (self.since, "", 0)
        return since if self.floor is None else max(self.floor, since)

    def fits(self, event: StoryEvent) -> bool:
        return self.kinds is None or type(event.event) in self.kinds


@dataclass(slots=True)
class _Gathered:
    """Events that were read; ``pending`` are those that may not be the next ones yet."""

    ready: list[tuple[Key, StoryEvent]] = field(default_factory=list)
    pending: list[tuple[Key, StoryEvent]] = field(default_factory=list)

    def settle(self, low: Key = _FIRST, high: Key = _END) -> None:
        self.ready += [item for item in self.pending if low <= item[0] <= high]
        self.pending = [item for item in self.pending if not low <= item[0] <= high]


async def find_key(store: SessionStore, session: Session, event_id: str, field_name: str) -> Key:
    """Return the place of the event that ``event_id`` names.

    Raises:
        InvalidInput: it has not the form of an event's id.
        TurnNotFound: it is of no turn of this session.
    """
    if found := _OF_FACT.fullmatch(event_id):
        return int(found[1]), _tie_of_fact(int(found[2])), 0
    found = _OF_TURN.fullmatch(event_id)
    if found is None:
        raise InvalidInput(field_name, "is not the id of an event")
    turn = await store.get_turn(session, found[1])
    seq = int(found[2])
    return _time_of(turn, seq), turn.turn_id, seq


async def tell_backwards(
    store: SessionStore, session: Session, asked: Asked, limit: int, before: Key = _END
) -> list[tuple[Key, StoryEvent]]:
    """Return the last ``limit`` events before ``before``, ascending."""
    position = None if before == _END else Position(int(before[0]), LAST)
    gathered, chunk = _Gathered(), _chunk(limit, asked)
    while True:
        entries = await store.list_entries(session, position, chunk, newest_first=True)
        events = [item for entry in entries for item in _events_of(entry, session)]
        gathered.pending += [
            item for item in events if asked.start <= item[0] < before and asked.fits(item[1])
        ]
        turns = [entry for entry in entries if isinstance(entry, Turn)]
        # What has not been read yet ended before the last turn that has been began, or just then.
        is_end = len(entries) < chunk or (bool(turns) and turns[-1].started_at < asked.start[0])
        gathered.settle(low=_FIRST if is_end else (turns[-1].started_at, LAST, 0) if turns else _END)
        if is_end or len(gathered.ready) >= limit:
            return sorted(gathered.ready, key=lambda item: item[0])[-limit:]
        position = position_of(entries[-1])


async def tell_forwards(
    store: SessionStore, session: Session, asked: Asked, limit: int, after: Key
) -> list[tuple[Key, StoryEvent]]:
    """Return the first ``limit`` events behind ``after``, ascending."""
    begin = max(after, asked.start)
    position = await _position_around(store, session, begin)
    gathered, chunk = _Gathered(), _chunk(limit, asked)
    while True:
        entries = await store.list_entries(session, position, chunk, newest_first=False)
        events = [item for entry in entries for item in _events_of(entry, session)]
        gathered.pending += [
            item for item in events if item[0] > after and item[0] >= asked.start and asked.fits(item[1])
        ]
        is_end = len(entries) < chunk
        gathered.settle(high=_END if is_end else _start_of(entries[-1]))
        if is_end or len(gathered.ready) >= limit:
            return sorted(gathered.ready, key=lambda item: item[0])[:limit]
        position = position_of(entries[-1])


async def _position_around(store: SessionStore, session: Session, key: Key) -> Position | None:
    """Return a place before every entry with events from ``key`` on: before a turn that began earlier."""
    if key == _FIRST:
        return None
    position = Position(int(key[0]), LAST)
    while True:
        entries = await store.list_entries(session, position, CHUNK_MAX // 10, newest_first=True)
        for entry in entries:
            if isinstance(entry, Turn) and entry.started_at < key[0]:
                return Position(entry.started_at)
        if len(entries) < CHUNK_MAX // 10:
            return None
        position = position_of(entries[-1])


def _events_of(entry: Entry, session: Session) -> Iterator[tuple[Key, StoryEvent]]:
    tie = tie_of(entry)
    if isinstance(entry, LoggedFact):
        event_id = f"fact:{entry.created_at}:{entry.number}"
        yield (entry.created_at, tie, 0), StoryEvent(event_id, entry.created_at, None, None, entry.fact)
        return
    for seq, event in replay(entry, session.key.session_id):
        time_ms = _time_of(entry, seq)
        story = StoryEvent(f"{entry.turn_id}:{seq}", time_ms, entry.turn_id, seq, event)
        yield (time_ms, tie, seq), story


def _time_of(turn: Turn, seq: int) -> int:
    return turn.started_at if seq <= 1 or turn.finished_at is None else turn.finished_at


def _start_of(entry: Entry) -> Key:
    time_ms, tie = position_of(entry)
    return time_ms, tie, 0 if isinstance(entry, LoggedFact) else 1


def _tie_of_fact(number: int) -> str:
    return f"!{number:016d}"


def _chunk(limit: int, asked: Asked) -> int:
    return min(CHUNK_MAX, limit // EVENTS_PER_TURN + 2) if asked.kinds is None else CHUNK_MAX
