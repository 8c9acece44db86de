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
        {"a": {"b": 1}, **{str(n): n for n in range(999)}},
    ):
        with pytest.raises(InvalidInput, match="metadata: must"):
            check_free_object(too_much, "metadata")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (nested(33), "metadata" + ".a" * 32),
        ({"a": [1, {"b": [nested(28), nested(29)]}]}, "metadata.a.1.b.1" + ".a" * 28),
        ({"a": 1.5, "b": [0.0, {"c": float("nan")}]}, "metadata.b.1.c"),
        ({"a": float("-inf")}, "metadata.a"),
    ],
)
def test_one_key_is_to_blame(value: dict, path: str) -> None:
    """What is too deep, or no number of JSON's, is named by its path."""
    with pytest.raises(InvalidInput) as caught:
        check_free_object(value, "metadata")
    assert caught.value.field == path
