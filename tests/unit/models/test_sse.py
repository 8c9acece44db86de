"""From bytes to events, wherever the bytes are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.errors import ModelError
from app.models.sse import EventSplitter

STREAM = (
    b": a comment\n\nevent: x\ndata: one\n\ndata:two\r\n\r\nid: 7\rdata: three\r\r"
    b"data: a\ndata: b\n\ndata\n\ndata: \xe4\xbd\xa0\xe5\xa5\xbd\n\n\n\ndata: [DONE]\n\ndata: cut off"
)
EVENTS = [b"one", b"two", b"three", b"a\nb", "你好".encode(), b"[DONE]"]


def read(*parts: bytes) -> list[bytes]:
    splitter = EventSplitter(1000)
    return [event for part in parts for event in splitter.feed(part)]


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
def test_a_stream_cut_in_two_anywhere(cut: int) -> None:
    """One cut at any byte changes nothing."""
    assert read(STREAM[:cut], STREAM[cut:]) == EVENTS


def test_a_stream_of_single_bytes() -> None:
    """Every byte alone gives the same."""
    assert read(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_a_stream_cut_anywhere(cuts: list[int]) -> None:
    """Any number of cuts gives the same."""
    edges = [0, *sorted(cuts), len(STREAM)]
    assert read(*(STREAM[a:b] for a, b in pairwise(edges))) == EVENTS


@pytest.mark.parametrize("part", [b"data: " + b"x" * 400, b"data: " + b"x" * 400 + b"\n", b"x" * 400])
def test_a_line_or_event_without_end_is_refused(part: bytes) -> None:
    """The limit holds for one line, for many lines of one event, and for what is no event at all."""
    splitter = EventSplitter(1000)
    splitter.feed(part)
    splitter.feed(part)
    with pytest.raises(ModelError):
        splitter.feed(part)


def test_the_limit_is_exact() -> None:
    """As many bytes as allowed are allowed."""
    splitter = EventSplitter(10)
    assert splitter.feed(b"data: 1234") == []
    assert splitter.feed(b"\n\n") == [b"1234"]
    with pytest.raises(ModelError):
        splitter.feed(b"data: 12345")
