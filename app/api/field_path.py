"""The name of a field in an error: dotted, short and printable whatever the client sent."""

from collections.abc import Sequence

_PART_CHARS = 64


def field_path(parts: Sequence[str | int], *, whole: str = "body") -> str:
    """Return ``("metadata", "x", 0)`` as ``metadata.x.0``; of nothing, ``whole``."""
    return ".".join(_printable(str(part)) for part in parts) or whole


def _printable(part: str) -> str:
    if len(part) > _PART_CHARS:
        part = part[:_PART_CHARS] + "…"
    return part if part.isprintable() else "".join(c if c.isprintable() else "?" for c in part)
