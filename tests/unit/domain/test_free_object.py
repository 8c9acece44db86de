"""Free JSON objects and their limits."""

import pytest

from app.domain.errors import InvalidInput
from app.domain.free_object import check_free_object


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def test_free_objects_have_limits() -> None:
    """64 KiB, 32 deep, 1,000 keys: the limit itself passes, one more does not."""
    check_free_object({"a": "x" * (65536 - len('{"a":""}'))}, "metadata")
    check_free_object(nested(32), "metadata")
    check_free_object({"a": [{}] * 5, **{str(n): n for n in range(999)}}, "metadata")
    for too_much in (
        {"a": "x" * (65537 - len('{"a":""}'))},
        nested(33),
        {"a": {"b": 1}, **{str(n): n for n in range(999)}},
    ):
        with pytest.raises(InvalidInput, match="metadata: must"):
            check_free_object(too_much, "metadata")
