"""A session: the durable conversation, and where it is in its life.

The record outlives every process and every live agent. Its status is never
stored: it follows from the times, so that nothing has to run for it to be right.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from app.domain.free_object import check_free_object
from app.domain.ids import SessionKey
from app.domain.turn import MESSAGES_PER_TURN, ContextMessage, JsonObject

TITLE_FROM_MESSAGE_CHARS = 40
DEFAULT_AGENT_ID = "assistant"


class SessionStatus(StrEnum):
    ACTIVE = "active"
    IDLE = "idle"
    ARCHIVED = "archived"
    EXPIRED = "expired"


class Unset:
    """The type of ``UNSET``: a field that a change leaves alone."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()


@dataclass(frozen=True, slots=True)
class LifeSpan:
    """How long a session's record stays (seconds, 0 = for ever), and how many of its facts (0 = all)."""

    idle_after_s: int = 1800
    ttl_s: int = 2_592_000
    retention_s: int = 604_800
    event_limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One session's record. Times are milliseconds since the epoch.

    ``uid`` names this incarnation: a session that is deleted and made again
    under the same id is another one, and a turn of the first can never commit
    into the second.
    ``depth`` is that of the head: the number of turns on the current branch.
    ``rev`` grows with each change of the record, never with a turn. ``state`` is that of the
    current branch, and ``state_rev`` grows with each change of it, whatever changed it.
    ``expires_at`` is ``None`` for an archived session and for one that never expires.
    """

    key: SessionKey
    uid: str
    app_name: str
    agent_id: str
    created_at: int
    updated_at: int
    last_accessed: int
    expires_at: int | None
    user_id: str | None = None
    window_id: str | None = None
    title: str | None = None
    provider: str | None = None
    model: str | None = None
    params: JsonObject = field(default_factory=dict)
    metadata: JsonObject = field(default_factory=dict)
    template: JsonObject | None = None
    ttl_s: int | None = None
    archived: bool = False
    marked_idle: bool = False
    head: str | None = None
    note: str | None = None  # newest compaction note on the path to the head
    depth: int = 0
    rev: int = 1
    state: JsonObject = field(default_factory=dict)
    state_rev: int = 0

    @property
    def turn_count(self) -> int:
        return self.depth

    @property
    def message_count(self) -> int:
        return MESSAGES_PER_TURN * self.depth

    @property
    def etag(self) -> str:
        return f"{self.head or 0}.{self.rev}"

    def status_at(self, now: int, life: LifeSpan) -> SessionStatus:
        if self.archived:
            return SessionStatus.ARCHIVED
        if self.expires_at is not None and now >= self.expires_at:
            return SessionStatus.EXPIRED
        if self.marked_idle:
            return SessionStatus.IDLE
        if life.idle_after_s and now >= self.last_accessed + life.idle_after_s * 1000:
            return SessionStatus.IDLE
        return SessionStatus.ACTIVE

    def with_state(self, state: JsonObject, *, by_turn: bool = False) -> "Session":
        """Return the session with this state, its revisions higher if that is a change.

        ``by_turn``: a turn's commit changes no ``rev``, since it changes the head.
        """
        # As JSON: to Python 1, 1.0 and true are equal.
        if json.dumps(state, sort_keys=True) == json.dumps(self.state, sort_keys=True):
            return self
        rev = self.rev if by_turn else self.rev + 1
        return replace(self, state=state, rev=rev, state_rev=self.state_rev + 1)

    def touched(self, now: int, life: LifeSpan, **others: Any) -> "Session":
        """Return the session after activity at ``now``: its expiry clock starts again.

        ``others`` are fields that change with it.
        """
        return replace(
            self,
            last_accessed=max(now, self.last_accessed),
            marked_idle=False,
            expires_at=None if self.archived else expiry(now, self.ttl_s, life),
            **others,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionChange:
    """What a PATCH or a sticky choice changes; ``UNSET`` leaves a field as it is.

    ``metadata``, ``params`` and ``template`` are merge patches (RFC 7396); every other field is replaced.
    """

    title: str | Unset | None = UNSET
    metadata: Mapping[str, Any] | Unset | None = UNSET
    status: SessionStatus | Unset = UNSET
    agent_id: str | Unset = UNSET
    provider: str | Unset | None = UNSET
    model: str | Unset | None = UNSET
    params: Mapping[str, Any] | Unset | None = UNSET
    template: Mapping[str, Any] | Unset | None = UNSET
    ttl_s: int | Unset | None = UNSET

    def apply(self, session: Session, now: int, life: LifeSpan) -> Session:
        """Return ``session`` with this change, its ``rev`` one higher.

        Raises:
            InvalidInput: the merged metadata or template would be larger than a session may keep.
        """
        values: dict[str, Any] = {"rev": session.rev + 1, "updated_at": max(now, session.updated_at)}
        for name in ("title", "agent_id", "provider", "model", "ttl_s"):
            if (value := getattr(self, name)) is not UNSET:
                values[name] = value
        if not isinstance(self.params, Unset):
            values["params"] = {} if self.params is None else merge_patch(session.params, self.params)
        if not isinstance(self.metadata, Unset):
            merged = {} if self.metadata is None else merge_patch(session.metadata, self.metadata)
            values["metadata"] = check_free_object(merged, "metadata")
        if not isinstance(self.template, Unset):
            merged = {} if self.template is None else merge_patch(session.template or {}, self.template)
            check_free_object(merged.get("context", {}), "template.context")
            values["template"] = merged or None
        changed = replace(session, **values)
        if not isinstance(self.status, Unset):
            return _with_status(changed, self.status, now, life)
        if not isinstance(self.ttl_s, Unset) and not changed.archived:
            return replace(changed, expires_at=expiry(changed.last_accessed, changed.ttl_s, life))
        return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionQuery:
    """A page of sessions, newest activity first. ``owner`` ``None``: of all owners (admins)."""

    owner: str | None
    now: int
    limit: int = 50
    cursor: str | None = None
    user_id: str | None = None
    agent_id: str | None = None
    window_id: str | None = None
    status: SessionStatus | None = None
    text: str | None = None  # case-insensitive in the title, or a prefix of the session id


@dataclass(frozen=True, slots=True)
class SessionCap:
    """How many sessions each user may have, and which may go for new ones of the same user.

    ``victims`` go in their order and no more than needed. One goes only as it was read: not
    if it has been active since, nor while a turn of it runs.
    """

    most: int
    victims: tuple[Session, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionPage:
    """``total`` is ``None`` when counting would cost too much."""

    sessions: tuple[Session, ...]
    total: int | None
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a live agent was built from. Equal stamp: it may be used as it is.

    ``state`` and ``shared`` are revisions: of the session's state, and of its application's and
    its user's, where its prompt names any.
    """

    head: str | None
    note: str | None
    rev: int
    profile: int
    state: int = 0
    shared: tuple[int, int] | None = None
    uid: str = ""  # which incarnation of the session


@dataclass(frozen=True, slots=True)
class Path:
    """The model context at ``head``: ``summary`` of the newest compaction note, then what came after it.

    ``messages`` are oldest first. ``stored_bytes`` is the length of what was read, from
    which the pool estimates memory.
    """

    head: str | None
    note: str | None
    messages: tuple[ContextMessage, ...]
    stored_bytes: int
    summary: str | None = None


def expiry(now: int, ttl_s: int | None, life: LifeSpan) -> int | None:
    """Return when a session that is active at ``now`` expires, or ``None`` for never."""
    ttl = life.ttl_s if ttl_s is None else ttl_s
    return now + ttl * 1000 if ttl else None


def merge_patch(target: Mapping[str, Any], patch: Mapping[str, Any]) -> JsonObject:
    """Return ``target`` after the JSON merge patch ``patch`` (RFC 7396)."""
    merged = dict(target)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            inner = merged.get(key)
            merged[key] = merge_patch(inner if isinstance(inner, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def _with_status(session: Session, status: SessionStatus, now: int, life: LifeSpan) -> Session:
    if status is SessionStatus.ARCHIVED:
        return replace(session, archived=True, expires_at=None)
    if status is SessionStatus.ACTIVE:
        return replace(session, archived=False).touched(now, life)
    restarted = replace(session, archived=False).touched(now, life) if session.archived else session
    return replace(restarted, marked_idle=True)
