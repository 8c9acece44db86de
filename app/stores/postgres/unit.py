"""What the works of one call share: the connection, and what became of records."""

from dataclasses import dataclass, field

from cachetools import LRUCache

from app.domain.ids import SessionKey
from app.domain.session import LifeSpan, Session
from app.stores.postgres.link import Connection
from app.stores.postgres.rows import Record
from app.stores.sealing import Sealer

CACHE_BYTES = 6 * 1024 * 1024
_RECORD_BYTES = 1500
_BYTES_PER_CHAR = 8
"""JSON takes six to ten times its text in Python, measured on objects of texts and of numbers."""


@dataclass(slots=True)
class View:
    """One call's connection, and what opens and seals what goes over it."""

    connection: Connection
    sealer: Sealer


@dataclass(slots=True)
class Unit(View):
    """A view that writes; what it notes counts only when the call has succeeded."""

    life: LifeSpan
    noted: dict[SessionKey, Record | None] = field(default_factory=dict)
    added: int = 0  # sessions, less those removed

    def note(self, record: Record) -> None:
        self.noted[record.session.key] = record

    def note_gone(self, key: SessionKey) -> None:
        self.noted[key] = None
        self.added -= 1


class RecordCache:
    """The records that this process saw last, the most recently used; others may have written newer ones.

    Whoever uses one says in the same statement which it was, and hears if it is old.
    """

    def __init__(self) -> None:
        self._records: LRUCache[SessionKey, Record] = LRUCache(CACHE_BYTES, _weight_of)

    def find(self, key: SessionKey) -> Record | None:
        return self._records.get(key)

    def find_for(self, session: Session) -> Record | None:
        """Return the record if it says of ``session`` what the caller's value says."""
        record = self._records.get(session.key)
        return record if record is not None and _version(record.session) == _version(session) else None

    def keep(self, record: Record) -> None:
        """Keep what was read or written last, whatever was here.

        No two records tell which is newer: the database may have come back without its last writes.
        One whose answer was overtaken by a later one is believed until the next call that uses it.
        """
        self._records[record.session.key] = record

    def drop(self, key: SessionKey) -> None:
        self._records.pop(key, None)

    def settle(self, unit: Unit) -> None:
        """Take over what a call that has succeeded noted."""
        for key, record in unit.noted.items():
            if record is None:
                self.drop(key)
            else:
                self.keep(record)


def is_same(one: Session, other: Session) -> bool:
    """Say whether a turn may go on from the one as from the other."""
    return _version(one) == _version(other)


def _version(session: Session) -> tuple[object, ...]:
    return session.uid, session.head, session.note, session.rev, session.state_rev


def _weight_of(record: Record) -> int:
    chars = sum(len(text) for text in record.texts if text)
    return min(_RECORD_BYTES + _BYTES_PER_CHAR * chars, CACHE_BYTES)
