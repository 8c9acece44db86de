"""How sessions, turns and people are named.

Ids are parsed here, once, at the rim; they are made behind the ``NewId`` port.
Everything inside may rely on a parsed id being short, printable and safe to
put into a header, a URL path, a log line or a database key.
"""

import re
from typing import NamedTuple

from app.domain.errors import InvalidInput

SESSION_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:@~-]{0,127}$"
RESERVED_SESSION_IDS = frozenset({"stats", "batch", "batch-delete", "resume"})
NAME_MAX_CHARS = 128
NAME_PATTERN = r"^(?!\.{1,2}$)[^/\u0000-\u001f\u007f-\u009f\u2028\u2029]+$"
"""What ``parse_name`` accepts, for those who read it in the documentation; beside the length."""
_UUID_BYTES = 16

_SESSION_ID = re.compile(SESSION_ID_PATTERN.removesuffix("$") + r"\Z")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")


class SessionKey(NamedTuple):
    """The address of a session: two owners may each have a session of the same id.

    ``owner`` is the credential's user, or ``""`` for the one namespace of ``AUTH_MODE=none``.
    """

    owner: str
    session_id: str


def parse_session_id(text: str, field: str = "session_id") -> str:
    """Return ``text`` if it may name a session.

    Raises:
        InvalidInput: it does not match ``SESSION_ID_PATTERN`` or is a reserved word.
    """
    if not _SESSION_ID.match(text):
        raise InvalidInput(field, f"must match {SESSION_ID_PATTERN}")
    if text in RESERVED_SESSION_IDS:
        raise InvalidInput(field, "is a reserved word")
    return text


def parse_name(text: str, field: str) -> str:
    """Return ``text`` if it may name a user, a window, an agent or an application.

    Raises:
        InvalidInput: it is empty, longer than 128 characters, ``.`` or ``..``, or has a
            slash, a control character or a lone surrogate in it.
    """
    if not 1 <= len(text) <= NAME_MAX_CHARS:
        raise InvalidInput(field, f"must have 1 to {NAME_MAX_CHARS} characters")
    if "/" in text or text in {".", ".."} or _CONTROL.search(text):
        raise InvalidInput(field, "must have no slash and no control character, and not be a dot segment")
    return text


def parse_uuid(text: str, field: str) -> str:
    """Return ``text`` if it is a lower-case UUID in its usual form, as turn and checkpoint ids are.

    Raises:
        InvalidInput: it is not.
    """
    if not _UUID.match(text):
        raise InvalidInput(field, "must be a UUID")
    return text


def to_id_bytes(text: str) -> bytes:
    """Return the 16 bytes that stores keep for a UUID.

    Raises:
        ValueError: it is none.
    """
    # Not uuid.UUID: a store translates ten ids for each turn, and this takes a fifth of the time.
    raw = bytes.fromhex(text.replace("-", ""))
    if len(raw) != _UUID_BYTES:
        raise ValueError("not a UUID")
    return raw


def from_id_bytes(raw: bytes) -> str:
    """Return the text form of 16 stored bytes.

    Raises:
        ValueError: they are not as many.
    """
    text = bytes(raw).hex()
    if len(text) != 2 * _UUID_BYTES:
        raise ValueError("not a UUID")
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
