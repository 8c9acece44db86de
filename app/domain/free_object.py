"""Free JSON objects: what people keep with a session (``metadata``, ``state``, ``data``), and its limits."""

import json
from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any

from app.domain.errors import InvalidInput

OBJECT_MAX_BYTES = 64 * 1024
OBJECT_MAX_DEPTH = 32
OBJECT_MAX_KEYS = 1_000


def check_free_object(
    value: dict[str, Any], field: str, *, max_bytes: int = OBJECT_MAX_BYTES
) -> dict[str, Any]:
    """Return ``value`` if it is small enough to be kept with a session.

    Raises:
        InvalidInput: over ``max_bytes`` of JSON, nested deeper than 32, more than 1,000 keys in all,
            or a number that JSON has not; where one key is to blame, ``field`` is the path to it.
    """
    # Depth first, since encoding recurses.
    depth, keys = _measure(value)
    if depth > OBJECT_MAX_DEPTH:
        path = _path_to(value, field, lambda item, above: above == OBJECT_MAX_DEPTH and _is_container(item))
        raise InvalidInput(path, f"must be nested at most {OBJECT_MAX_DEPTH} deep")
    if keys > OBJECT_MAX_KEYS:
        raise InvalidInput(field, f"must have at most {OBJECT_MAX_KEYS} keys in all")
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        path = _path_to(value, field, lambda item, _: isinstance(item, float) and not isfinite(item))
        raise InvalidInput(path, "must be a finite number") from None
    if len(text.encode("utf-8", "surrogatepass")) > max_bytes:
        raise InvalidInput(field, f"must take at most {max_bytes} bytes as JSON")
    return value


def _measure(value: dict[str, Any]) -> tuple[int, int]:
    """Return how deep ``value`` is nested and how many keys it has in all."""
    depth, keys = 0, 0
    level: list[Any] = [value]
    while level:
        depth += 1
        keys += sum(len(container) for container in level if isinstance(container, dict))
        level = [child for container in level for _, child in _members(container) if _is_container(child)]
    return depth, keys


def _path_to(value: Any, field: str, is_wrong: Callable[[Any, int], bool]) -> str:
    """Return the dotted path to the first part that is wrong; what encloses it is counted, too."""
    level: list[tuple[str, Any]] = [(field, value)]
    above = 0
    while level:
        for path, item in level:
            if is_wrong(item, above):
                return path
        above += 1
        level = [(f"{path}.{name}", child) for path, item in level for name, child in _members(item)]
    return field


def _members(item: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(item, dict):
        return item.items()
    return enumerate(item) if isinstance(item, list) else ()


def _is_container(item: Any) -> bool:
    return isinstance(item, dict | list)
