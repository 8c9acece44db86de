"""The newest records of sessions, as the writer wrote them: a turn that finds its session here need not read.

Nobody else writes the file, so the record that was committed last is the one in the
file. Always true:

* from just before a commit until the event loop has heard of it no record that it may
  change is answered: readers may see it already, and nobody may find something older then;
* of a commit that failed nothing is believed;
* what a reader found is not kept: something newer may have been committed meanwhile.

Records are values that nobody changes, their JSON included, so all may share them.
"""

from typing import NamedTuple

from cachetools import LRUCache

from app.domain.ids import SessionKey
from app.domain.session import Session

CACHE_BYTES = 6 * 1024 * 1024
_RECORD_BYTES = 1500
_BYTES_PER_CHAR = 8
"""JSON takes six to ten times its text in Python, measured on objects of texts and of numbers."""


class Saved(NamedTuple):
    """A record and about how many bytes it takes."""

    session: Session
    weight: int


def weigh(session: Session, json_chars: int) -> Saved:
    """Return the record, whose JSON columns have so many characters, with its weight."""
    return Saved(session, min(_RECORD_BYTES + _BYTES_PER_CHAR * json_chars, CACHE_BYTES))


Changes = dict[SessionKey, Saved | None]
"""What a transaction made of records; ``None``: it removed the session."""


class RecordCache:
    """Some thousand records, the most recently used; every call but ``expect`` is the event loop's."""

    def __init__(self) -> None:
        self._records: LRUCache[SessionKey, Saved] = LRUCache(CACHE_BYTES, _weight_of)
        self._expected: list[Changes] = []

    def find(self, key: SessionKey) -> Session | None:
        """Return the session's record; ``None`` says only that it is not known here."""
        if any(key in changes for changes in self._expected):
            return None
        saved = self._records.get(key)
        return None if saved is None else saved.session

    def expect(self, changes: Changes) -> None:
        """Hear in the writer's thread what is about to be committed; ``settle`` follows in this order."""
        self._expected.append(changes)

    def settle(self, *, is_committed: bool) -> None:
        """Hear how the oldest expected commit ended."""
        for key, saved in self._expected.pop(0).items():
            if saved is not None and is_committed:
                self._records[key] = saved
            else:
                self._records.pop(key, None)


def _weight_of(saved: Saved) -> int:
    return saved.weight
