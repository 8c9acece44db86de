"""Times as the native face shows and reads them."""

import re
from datetime import UTC, datetime, timedelta

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.ASCII | re.IGNORECASE)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_time(ms: int) -> str:
    """Return milliseconds since the epoch as RFC 3339 in UTC, with ``Z`` and milliseconds."""
    return f"{(_EPOCH + timedelta(milliseconds=ms)).isoformat(timespec='milliseconds')[:-6]}Z"


def to_optional_time(ms: int | None) -> str | None:
    return None if ms is None else to_time(ms)


def parse_time(text: str) -> int:
    """Return the time that RFC 3339 text names in milliseconds since the epoch, 0 for one before that.

    Raises:
        ValueError: it is no such text, or there is no such time.
    """
    if _TIME.fullmatch(text) is None:
        raise ValueError("must be a time like 2026-11-20T10:00:00.000Z")
    try:
        time = datetime.fromisoformat(text.upper())
    except ValueError:
        raise ValueError("must be a time that there is") from None
    return max(0, (time - _EPOCH) // timedelta(milliseconds=1))
