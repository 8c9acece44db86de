"""What changes make of a session's record."""

import pytest

from app.domain.errors import InvalidInput
from app.domain.ids import SessionKey
from app.domain.session import LifeSpan, Session, SessionChange, SessionStatus, merge_patch

LIFE = LifeSpan(idle_after_s=10, ttl_s=100, retention_s=1000)


def session(**given) -> Session:
    values = {"created_at": 0, "updated_at": 0, "last_accessed": 0, "expires_at": 100_000} | given
    return Session(key=SessionKey("", "s"), uid="u", app_name="default", agent_id="assistant", **values)


def test_metadata_and_params_are_merged():
    """A patch replaces, adds and, with null, removes; null for the whole empties it."""
    record = session(metadata={"a": 1, "b": {"c": 2, "d": 3}}, params={"seed": 1, "top_p": 0.5})
    changed = SessionChange(
        metadata={"a": None, "b": {"c": 9}, "e": 4}, params={"seed": None, "temperature": 0.1}
    ).apply(record, 5, LIFE)
    assert changed.metadata == {"b": {"c": 9, "d": 3}, "e": 4}
    assert changed.params == {"top_p": 0.5, "temperature": 0.1}
    assert SessionChange(metadata=None, params=None).apply(record, 5, LIFE).metadata == {}
    assert SessionChange(metadata={}).apply(record, 5, LIFE).metadata == record.metadata
    assert (changed.rev, changed.updated_at) == (record.rev + 1, 5)


def test_merged_metadata_keeps_the_limit():
    """Two patches that fit do not add up to more than a session may keep."""
    record = session(metadata={"a": "x" * 40_000})
    with pytest.raises(InvalidInput, match="metadata"):
        SessionChange(metadata={"b": "x" * 40_000}).apply(record, 5, LIFE)


def test_merge_patch_follows_rfc_7396():
    """The RFC's own cases for objects."""
    assert merge_patch({"a": "b"}, {"a": "c"}) == {"a": "c"}
    assert merge_patch({"a": "b"}, {"b": "c"}) == {"a": "b", "b": "c"}
    assert merge_patch({"a": "b"}, {"a": None}) == {}
    assert merge_patch({"a": ["b"]}, {"a": "c"}) == {"a": "c"}
    assert merge_patch({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}) == {"a": {"b": "d"}}
    assert merge_patch({}, {"a": {"bb": {"ccc": None}}}) == {"a": {"bb": {}}}


def test_status_follows_from_the_times():
    """Active, then idle, then expired, each from its very millisecond on."""
    record = session()
    steps = {9_999: "active", 10_000: "idle", 99_999: "idle", 100_000: "expired"}
    assert {at: record.status_at(at, LIFE) for at in steps} == steps


def test_status_by_hand():
    """Archived never expires; un-archiving restarts the clock; idle lasts until the next activity."""
    archived = SessionChange(status=SessionStatus.ARCHIVED).apply(session(), 5_000, LIFE)
    assert (archived.status_at(10**12, LIFE), archived.expires_at) == ("archived", None)
    back = SessionChange(status=SessionStatus.ACTIVE).apply(archived, 7_000, LIFE)
    assert (back.status_at(7_000, LIFE), back.expires_at) == ("active", 107_000)
    idle = SessionChange(status=SessionStatus.IDLE).apply(session(), 1, LIFE)
    assert idle.status_at(2, LIFE) == "idle"
    assert idle.touched(3, LIFE).status_at(3, LIFE) == "active"


def test_ttl_of_its_own():
    """``ttl_s`` moves the expiry from the last activity on; 0 means never."""
    assert SessionChange(ttl_s=5).apply(session(last_accessed=1_000), 9_000, LIFE).expires_at == 6_000
    assert SessionChange(ttl_s=0).apply(session(), 9_000, LIFE).expires_at is None
    assert SessionChange(ttl_s=None).apply(session(ttl_s=5), 9_000, LIFE).expires_at == 100_000
