"""What request bodies and queries accept, refuse and mean."""

import pytest
from pydantic import TypeAdapter, ValidationError

from app.api.native.fields import Flag, Limit, Params, check_message, is_blank
from app.api.native.requests import ChatBody, NewSessionBody, SessionPatch
from app.api.native.times import parse_time, to_time
from app.api.owner import namespace_of
from app.domain.errors import InvalidInput
from app.domain.principal import ANYONE
from app.domain.session import UNSET, SessionStatus

HERE = namespace_of(ANYONE, None)


def fields_of(error: ValidationError) -> list[str]:
    return [".".join(map(str, entry["loc"])) for entry in error.errors()]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "message"),
        ({"message": None}, "message"),
        ({"message": ""}, "message"),
        ({"message": 7}, "message"),
        ({"message": "x", "nope": 1}, "nope"),
        ({"message": "x", "__proto__": {}}, "__proto__"),
        ({"message": "x", "model_config": {}}, "model_config"),
        ({"message": "x", "session_id": "a/b"}, "session_id"),
        ({"message": "x", "session_id": "-a"}, "session_id"),
        ({"message": "x", "session_id": "a" * 129}, "session_id"),
        ({"message": "x", "session_id": "stats"}, "session_id"),
        ({"message": "x", "session_id": "a\n"}, "session_id"),
        ({"message": "x", "session_id": 1}, "session_id"),
        ({"message": "x", "conversation_id": "a b"}, "conversation_id"),
        ({"message": "x", "session_id": "a", "conversation_id": "b"}, "conversation_id"),
        ({"message": "x", "model": "a", "model_name": "b"}, "model_name"),
        ({"message": "x", "user_id": ""}, "user_id"),
        ({"message": "x", "user_id": "a/b"}, "user_id"),
        ({"message": "x", "user_id": ".."}, "user_id"),
        ({"message": "x", "window_id": "a" * 129}, "window_id"),
        ({"message": "x", "on_busy": "merge"}, "on_busy"),
        ({"message": "x", "on_disconnect": "stop"}, "on_disconnect"),
        ({"message": "x", "parent": "Root"}, "parent"),
        ({"message": "x", "parent": ""}, "parent"),
        ({"message": "x", "state": {}}, "state"),
        ({"message": "x", "metadata": []}, "metadata"),
        ({"message": "x", "params": {"temperature": 2.1}}, "params.temperature"),
        ({"message": "x", "params": {"temperature": True}}, "params.temperature"),
        ({"message": "x", "params": {"temperature": "0.2"}}, "params.temperature"),
        ({"message": "x", "params": {"max_tokens": 0}}, "params.max_tokens"),
        ({"message": "x", "params": {"max_tokens": 1.0}}, "params.max_tokens"),
        ({"message": "x", "params": {"n": 1000}}, "params.n"),
        ({"message": "x", "params": {"stop": []}}, "params.stop"),
        ({"message": "x", "params": {"stop": [""]}}, "params.stop.0"),
        ({"message": "x", "params": {"stop": 7}}, "params.stop"),
        ({"message": "x", "params": {"reasoning_effort": "much"}}, "params.reasoning_effort"),
    ],
)
def test_unfit_chat_bodies(body: dict, field: str) -> None:
    """Each is refused at the one field that does not fit."""
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate(body)
    assert fields_of(caught.value) == [field]


def test_names_of_the_other_documents() -> None:
    """``conversation_id`` and ``model_name`` mean what ours mean; the same value twice is fine."""
    body = {"message": "x", "conversation_id": "c", "session_id": "c", "model_name": "m", "model": "m"}
    request = ChatBody.model_validate(body).to_request(HERE, redact_keys=True)
    assert (request.session_id, request.model) == ("c", "m")
    request = ChatBody.model_validate({"message": "x", "conversation_id": "c", "model_name": "m"}).to_request(
        HERE, redact_keys=True
    )
    assert (request.session_id, request.model) == ("c", "m")


def test_null_and_empty_mean_left_out() -> None:
    """In chat, ``null`` anywhere and an empty session id are as if they were not there."""
    nothing = dict.fromkeys(
        ("user_id", "window_id", "app_name", "agent_id", "provider", "model", "model_name", "params",
         "metadata", "on_busy", "on_disconnect", "parent", "conversation_id")
    )  # fmt: skip
    full = ChatBody.model_validate({"message": "x", "session_id": "", **nothing})
    empty = ChatBody.model_validate({"message": "x"})
    assert full.to_request(HERE, redact_keys=True) == empty.to_request(HERE, redact_keys=True)
    assert (
        ChatBody.model_validate({"message": "x", "session_id": "", "conversation_id": "c"})
        .to_request(HERE, redact_keys=True)
        .session_id
        == "c"
    )


def test_secrets_are_redacted_unless_switched_off() -> None:
    """``redact_keys`` decides what is stored."""
    body = ChatBody.model_validate({"message": "x", "metadata": {"api_key": "k"}})
    assert body.to_request(HERE, redact_keys=True).metadata == {"api_key": "[redacted]"}
    assert body.to_request(HERE, redact_keys=False).metadata == {"api_key": "k"}


def test_params_keep_what_was_given() -> None:
    """One stop text becomes a list of one; ``null`` is nothing."""
    params = Params.model_validate({"temperature": 0, "stop": "END", "seed": None})
    assert params.to_json() == {"temperature": 0, "stop": ["END"]}


@pytest.mark.parametrize(
    "text", ["", " ", "\t\n", "\u200b", "\u00a0\u3000", "\u2028", "\ufeff \u200d", "\x1b"]
)
def test_messages_in_which_nothing_can_be_seen(text: str) -> None:
    """Separators, controls and format characters alone are no message."""
    with pytest.raises(InvalidInput):
        check_message(text, 100)


@pytest.mark.parametrize("text", ["a", " 你 ", "\u200b👍", "\x1b[31m", "̈", "a" * 100])
def test_messages_with_something_to_see(text: str) -> None:
    """One visible character is enough, and the limit itself is allowed."""
    check_message(text, 100)


def test_a_message_beyond_the_limit() -> None:
    """Characters are counted, not bytes."""
    check_message("你" * 100, 100)
    with pytest.raises(InvalidInput):
        check_message("你" * 101, 100)


def test_blank_is_a_matter_of_unicode() -> None:
    """A private-use or combining character can be seen, a soft hyphen cannot."""
    assert is_blank("\u00ad")
    assert not is_blank("\ue000")


@pytest.mark.parametrize(
    "text", ["0", "201", "-1", "+1", "1_0", "5.0", " 5", "", "1e2", "１", "9" * 5000, "true"]
)
def test_limits_that_do_not_fit(text: str) -> None:
    """Only plain digits from 1 to 200."""
    with pytest.raises(ValidationError):
        TypeAdapter(Limit).validate_python(text)


@pytest.mark.parametrize(("text", "limit"), [("1", 1), ("200", 200), ("007", 7)])
def test_limits_that_fit(text: str, limit: int) -> None:
    """The smallest and the largest are allowed."""
    assert TypeAdapter(Limit).validate_python(text) == limit


def test_flags_are_spelt_out() -> None:
    """``true`` and ``false``, nothing else."""
    assert TypeAdapter(Flag).validate_python("true") is True
    assert TypeAdapter(Flag).validate_python("false") is False
    for text in ("1", "True", "yes", ""):
        with pytest.raises(ValidationError):
            TypeAdapter(Flag).validate_python(text)


def test_a_patch_changes_what_it_names() -> None:
    """What is left out stays; ``null`` takes away."""
    change = SessionPatch.model_validate({"title": None, "status": "archived"}).to_change(
        HERE, redact_keys=True
    )
    assert change.title is None
    assert change.status is SessionStatus.ARCHIVED
    assert change.metadata is UNSET
    assert change.provider is UNSET
    assert change.params is UNSET


def test_a_patch_keeps_deletions_in_metadata() -> None:
    """``null`` reaches the merge, even under a key that names a secret."""
    change = SessionPatch.model_validate({"metadata": {"a": None, "token": None, "password": "p"}}).to_change(
        HERE, redact_keys=True
    )
    assert change.metadata == {"a": None, "token": None, "password": "[redacted]"}


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"status": None}, "status"),
        ({"status": "expired"}, "status"),
        ({"ttl_s": -1}, "ttl_s"),
        ({"ttl_s": 1.5}, "ttl_s"),
        ({"title": ""}, "title"),
        ({"title": "a\nb"}, "title"),
        ({"title": "x" * 201}, "title"),
        ({"agent_id": "x"}, "agent_id"),
        ({"template": []}, "template"),
        ({"template": {"context": {"a": 1}, "tools": []}}, "template.tools"),
        ({"state": {}}, "state"),
        ({"session_id": "x"}, "session_id"),
    ],
)
def test_unfit_patches(patch: dict, field: str) -> None:
    """Each is refused at the one field that does not fit."""
    with pytest.raises(ValidationError) as caught:
        SessionPatch.model_validate(patch)
    assert fields_of(caught.value) == [field]


def test_an_empty_body_makes_a_session() -> None:
    """Everything about a new session may be left out; 0 seconds means for ever."""
    assert NewSessionBody().to_new_session(HERE, redact_keys=True).owner == ""
    assert NewSessionBody.model_validate({"ttl_s": 0}).to_new_session(HERE, redact_keys=True).ttl_s == 0


def test_a_template_in_a_patch() -> None:
    """What is left out of it stays, ``null`` reaches the merge; an empty one makes no template."""
    patch = {"template": {"system_prompt": None, "context": {"token": "t", "a": None}}}
    change = SessionPatch.model_validate(patch).to_change(HERE, redact_keys=True)
    assert change.template == {"system_prompt": None, "context": {"token": "[redacted]", "a": None}}
    assert SessionPatch.model_validate({"template": None}).to_change(HERE, redact_keys=True).template is None
    body = NewSessionBody.model_validate({"template": {"context": None}})
    assert body.to_new_session(HERE, redact_keys=True).template is None


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1969-12-31T23:59:59Z", 0),
        ("2026-11-20T10:00:00.007Z", 1_795_168_800_007),
        ("2026-11-20t18:00:00.0079+08:00", 1_795_168_800_007),
        ("2026-11-20T10:00:00.123456789-00:00", 1_795_168_800_123),
        ("2026-11-20T10:00:00.1z", 1_795_168_800_100),
    ],
)
def test_times(text: str, ms: int) -> None:
    """RFC 3339 with any offset, in milliseconds, cut off; before 1970 is 1970."""
    assert parse_time(text) == ms
    assert parse_time(to_time(ms)) == ms


@pytest.mark.parametrize(
    "text",
    ["", "2026-11-20", "2026-11-20T10:00:00", "2026-11-20 10:00:00Z", "2026-13-01T00:00:00Z",
     "2026-11-20T10:00:60Z", "0000-01-01T00:00:00Z", "2026-11-20T10:00:00+24:00", "20261120T100000Z",
     "２026-11-20T10:00:00Z", "2026-11-20T10:00:00.Z"],
)  # fmt: skip
def test_what_is_no_time(text: str) -> None:
    """No date alone, no time of nowhere, nothing that is not in the calendar."""
    with pytest.raises(ValueError, match="must be a time"):
        parse_time(text)
