"""Cursors that are good for one query."""

import pytest

from app.api.native.cursor import open_cursor, seal_cursor
from app.domain.errors import InvalidInput


@pytest.mark.parametrize(
    "query", [("turns", "s"), ("sessions", None, "a", None), ("sessions", "张三", "\udc00")]
)
def test_a_cursor_comes_back_as_it_was(query: tuple[str | None, ...]) -> None:
    """What was sealed with a query is opened with it, whatever the cursor looks like."""
    for cursor in ("", "abc", "=_-"):
        assert open_cursor(seal_cursor(cursor, *query), *query) == cursor


def test_no_cursor_is_none() -> None:
    """The first page has none, and neither has what follows the last."""
    assert open_cursor(None, "turns", "s") is None
    assert seal_cursor(None, "turns", "s") is None


@pytest.mark.parametrize(
    "other", [("turns", "t"), ("turns",), ("turns", "s", None), ("turn", "ss"), ("turns", None)]
)
def test_another_query_refuses_it(other: tuple[str | None, ...]) -> None:
    """Names and values that only look alike together are not mixed up."""
    with pytest.raises(InvalidInput) as caught:
        open_cursor(seal_cursor("abc", "turns", "s"), *other)
    assert caught.value.field == "cursor"


@pytest.mark.parametrize("text", ["", "x", "abc", "a" * 1024])
def test_what_is_no_cursor(text: str) -> None:
    """Anything else is refused, short or long."""
    with pytest.raises(InvalidInput):
        open_cursor(text, "turns", "s")
