"""What people wrote into a session's record, as stores keep it: as text, or with keys each sealed.

A sealed one counts only for its session and in its own column.
"""

from typing import Any

from app.domain.errors import SnapshotUnreadable
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.stores.codec import PLAIN, from_json_text, to_body, to_json_text
from app.stores.sealing import Sealer

COLUMNS = ("title", "params", "metadata", "template", "state")
Stored = str | bytes | None


def to_texts(sealer: Sealer, session: Session, uid: bytes) -> tuple[Stored, ...]:
    """Return what is stored of ``COLUMNS``, ``None`` for what is empty.

    With keys a title is stored though there is none, so that without its key no session is
    readable in parts.
    """
    objects = (
        to_json_text(session.params) if session.params else None,
        to_json_text(session.metadata) if session.metadata else None,
        None if session.template is None else to_json_text(session.template),
        to_json_text(session.state) if session.state else None,
    )
    if not sealer.encrypts:
        return (session.title, *objects)
    bodies = (to_body(session.title), *(text and bytes([PLAIN]) + text.encode() for text in objects))
    return tuple(
        body and sealer.seal(body, _cover(session.key, uid, column))
        for column, body in zip(COLUMNS, bodies, strict=True)
    )


def from_text(sealer: Sealer, key: SessionKey, uid: bytes, column: str, stored: Stored) -> Any:
    """Return the value of a column of JSON, ``None`` if it is empty.

    Raises:
        SnapshotUnreadable: it is broken, or its key is missing.
    """
    if not isinstance(stored, bytes):
        return None if stored is None else from_json_text(stored)
    value = sealer.open(stored, _cover(key, uid, column))
    if not isinstance(value, dict):
        raise SnapshotUnreadable
    return value


def from_title(sealer: Sealer, key: SessionKey, uid: bytes, stored: Stored) -> str | None:
    """Return the title.

    Raises:
        SnapshotUnreadable: it is broken, or its key is missing.
    """
    if not isinstance(stored, bytes):
        return stored
    title = sealer.open(stored, _cover(key, uid, "title"))
    if not isinstance(title, str | None):
        raise SnapshotUnreadable
    return title


def _cover(key: SessionKey, uid: bytes, column: str) -> bytes:
    return uid + "\0".join((column, *key)).encode()
