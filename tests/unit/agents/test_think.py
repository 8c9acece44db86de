"""Reasoning and answer told apart, wherever the text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.agents.think import ThinkSplitter


def split(*pieces: str) -> tuple[str, str]:
    splitter = ThinkSplitter()
    parts = [splitter.feed(piece) for piece in pieces] + [splitter.end()]
    return "".join(text for text, _ in parts), "".join(reasoning for _, reasoning in parts)


def cut(text: str, edges: list[int]) -> list[str]:
    places = [0, *sorted(e % (len(text) + 1) for e in edges), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


CASES = [
    ("<think>why</think>because", "because", "why"),
    ("\n <think>why < not </thin> </think>\n\nbecause </think>", "because </think>", "why < not </thin> "),
    ("no reasoning <think>here</think>", "no reasoning <think>here</think>", ""),
    ("<thing>", "<thing>", ""),
    ("  leading space", "  leading space", ""),
    ("<think>never ends </thi", "", "never ends </thi"),
    ("<think></think>x", "x", ""),
    ("<thi", "<thi", ""),
    ("", "", ""),
    ("你好<", "你好<", ""),
]


@pytest.mark.parametrize(("whole", "text", "reasoning"), CASES)
def test_cut_in_two_at_every_place(whole: str, text: str, reasoning: str) -> None:
    """A tag cut anywhere is still a tag."""
    for place in range(len(whole) + 1):
        assert split(whole[:place], whole[place:]) == (text, reasoning)
    assert split(*whole) == (text, reasoning)


@given(st.sampled_from(CASES), st.lists(st.integers(0, 99), max_size=6))
def test_cut_anywhere(case: tuple[str, str, str], edges: list[int]) -> None:
    """Any number of cuts gives the same."""
    whole, text, reasoning = case
    assert split(*cut(whole, edges)) == (text, reasoning)


def test_a_model_that_reasons_again() -> None:
    """Reasoning that comes back, as clients mark it, does not get into the text."""
    assert split("<think>a", "</think>one ", "<think>b</think>two") == ("one two", "ab")


def test_text_is_passed_on_at_once() -> None:
    """Nothing is held back once an answer has begun."""
    splitter = ThinkSplitter()
    assert splitter.feed("Hello <") == ("Hello <", "")
    assert splitter.feed("<think>") == ("<think>", "")
