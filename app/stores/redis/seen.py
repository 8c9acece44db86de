"""The newest records that this process has seen: bounded, and never believed without asking."""

from cachetools import LRUCache

from app.domain.ids import SessionKey
from app.stores.redis.rows import Record

SEEN_BYTES = 6 * 1024 * 1024
_RECORD_BYTES = 1500
_BYTES_PER_CHAR = 8
"""JSON takes six to ten times its text in Python, measured on objects of texts and of numbers."""


class Seen:
    """Some thousand records, the most recently used. Any of them may be old."""

    def __init__(self) -> None:
        self._records: LRUCache[SessionKey, Record] = LRUCache(SEEN_BYTES, _weigh)

    def find(self, key: SessionKey) -> Record | None:
        return self._records.get(key)

    def put(self, record: Record) -> None:
        self._records[record.session.key] = record

    def drop(self, key: SessionKey) -> None:
        self._records.pop(key, None)


def _weigh(record: Record) -> int:
    return min(_RECORD_BYTES + _BYTES_PER_CHAR * len(record.json), SEEN_BYTES)
