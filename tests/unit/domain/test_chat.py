"""What a chat asks for: choices that stick, and what makes two requests the same one."""

from dataclasses import replace

import pytest

from app.domain.chat import ChatRequest, Choices, OnBusy, OnDisconnect
from app.domain.errors import InvalidInput
from app.domain.idempotency import parse_key
from tests.fakes import make_session

REQUEST = ChatRequest(message="hello", session_id="s", idempotency_key="k")


def test_choices_that_the_session_has_change_nothing():
    """Nothing chosen, or nothing new, leaves the record and its tag alone."""
    session = make_session(model="m", params={"seed": 1})
    assert Choices().change_of(session) is None
    assert Choices("assistant", None, "m", {"seed": 1}).change_of(session) is None


def test_params_are_chosen_as_a_whole():
    """What is not given any more goes back to its default."""
    change = Choices(params={"top_p": 0.5}).change_of(make_session(params={"seed": 1, "top_p": 0.1}))
    assert change is not None
    assert change.params == {"seed": None, "top_p": 0.5}


@pytest.mark.parametrize(
    "other",
    [
        {"message": "hello "},
        {"session_id": "t"},
        {"session_id": None},
        {"agent_id": "assistant"},
        {"provider": "p"},
        {"model": "m"},
        {"params": {}},
        {"metadata": {"a": 1}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_request_has_another_fingerprint(other):
    """Everything that the contract compares makes a difference, given and not given, too."""
    first, second = REQUEST.binding, replace(REQUEST, **other).binding
    assert first is not None
    assert second is not None
    assert first.fingerprint != second.fingerprint


def test_how_it_is_sent_makes_no_difference():
    """What becomes of a busy session, or of the turn when its client leaves, is not compared."""
    other = replace(REQUEST, on_busy=OnBusy.INTERRUPT, on_disconnect=OnDisconnect.CANCEL)
    assert other.binding == REQUEST.binding
    assert (
        replace(REQUEST, params={"a": 1, "b": 2}).binding == replace(REQUEST, params={"b": 2, "a": 1}).binding
    )


def test_without_a_key_nothing_is_bound():
    """A request without a key has no binding; one without a session has one that is its own."""
    assert replace(REQUEST, idempotency_key=None).binding is None
    assert replace(REQUEST, session_id=None).binding not in (None, REQUEST.binding)


@pytest.mark.parametrize("key", ["", "a b", "ä", "a\n", "\x7f", "x" * 129])
def test_a_key_is_visible_ascii(key):
    """1 to 128 visible ASCII characters, nothing else."""
    with pytest.raises(InvalidInput):
        parse_key(key)
    assert parse_key("x" * 128) == "x" * 128
