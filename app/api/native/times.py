"""Times as the native face shows them."""

from datetime import UTC, datetime


def to_time(ms: int) -> str:
    """Return milliseconds since the epoch as RFC 3339 in UTC, with ``Z`` and milliseconds."""
    whole = datetime.fromtimestamp(ms // 1000, UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"


def to_optional_time(ms: int | None) -> str | None:
    return None if ms is None else to_time(ms)
