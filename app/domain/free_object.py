"""Free JSON objects: what people keep with a session (``metadata``, ``state``, ``data``), and its limits."""

import json
from typing import Any

from app.domain.errors import InvalidInput

OBJECT_MAX_BYTES = 64 * 1024
OBJECT_MAX_DEPTH = 32
OBJECT_MAX_KEYS = 1_000


def check_free_object(value: dict[str, Any], field: str) -> dict[str, Any]:
    """Return ``value`` if it is small enough to be kept with a session.

    Raises:
        InvalidInput: over 64 KiB of JSON, nested deeper than 32, or more than 1,000 keys in all.
    """
    # Depth first, since encoding recurses.
    depth, keys = _measure(value)
    if depth > OBJECT_MAX_DEPTH:
        raise InvalidInput(field, f"must be nested at most {OBJECT_MAX_DEPTH} deep")
    if keys > OBJECT_MAX_KEYS:
        raise InvalidInput(field, f"must have at most {OBJECT_MAX_KEYS} keys in all")
    if len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()) > OBJECT_MAX_BYTES:
        raise InvalidInput(field, f"must take at most {OBJECT_MAX_BYTES} bytes as JSON")
    return value


def _measure(value: dict[str, Any]) -> tuple[int, int]:
    """Return how deep ``value`` is nested and how many keys it has in all."""
    depth, keys = 0, 0
    level: list[Any] = [value]
    while level:
        depth += 1
        keys += sum(len(container) for container in level if isinstance(container, dict))
        level = [
            child for container in level for child in _members(container) if isinstance(child, dict | list)
        ]
    return depth, keys


def _members(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container
