"""Cursors as clients hold them: a store's, sealed with the query that they are good for."""

import base64
import hashlib

from app.domain.errors import InvalidInput

_SEAL_CHARS = 8


def seal_cursor(cursor: str | None, *query: str | None) -> str | None:
    """Return the store's ``cursor`` so that only ``query`` accepts it."""
    return None if cursor is None else _seal_of(query) + cursor


def open_cursor(text: str | None, *query: str | None) -> str | None:
    """Return the store's cursor in ``text``; whether it is one is for the store to say.

    Raises:
        InvalidInput: it is of another query.
    """
    if text is None:
        return None
    if not text.startswith(_seal_of(query)):
        raise InvalidInput("cursor", "is of another query")
    return text[_SEAL_CHARS:]


def _seal_of(query: tuple[str | None, ...]) -> str:
    digest = hashlib.blake2b(repr(query).encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return base64.urlsafe_b64encode(digest).decode()
