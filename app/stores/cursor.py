"""Where a page of a listing ended, as text that only the same listing reads."""

import base64
import binascii

from app.domain.errors import InvalidInput

_MAX_TIME_MS = 2**53


def to_cursor(kind: str, time_ms: int, tie: str) -> str:
    """Return the opaque text for "after the entry with this time and tie-breaker"."""
    return base64.urlsafe_b64encode(f"{kind}{time_ms}.{tie}".encode()).decode().rstrip("=")


def from_cursor(kind: str, text: str) -> tuple[int, str]:
    """Return the time and tie-breaker in a cursor of this ``kind`` (one letter).

    Raises:
        InvalidInput: it is not such a cursor.
    """
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
        time_text, dot, tie = raw[1:].partition(".")
        time_ms = int(time_text)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput("cursor", "is not one of this listing's cursors") from error
    if raw[0] != kind or not dot or not tie or abs(time_ms) > _MAX_TIME_MS:
        raise InvalidInput("cursor", "is not one of this listing's cursors")
    return time_ms, tie
