"""What Redis keeps of sessions <-> domain values, each checked against its seal.

A session's record is two sealed values: a short one that every turn writes, and its JSON, which
only a change of it writes; the first vouches for the second. A turn is a fixed head, which the
scripts read, too, its names, and its sealed body.
"""

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

from app.domain.errors import SnapshotUnreadable
from app.domain.ids import SessionKey, from_id_bytes, to_id_bytes
from app.domain.session import Session
from app.domain.turn import Activation, Turn, TurnError, TurnStatus
from app.stores.codec import (
    TurnColumns,
    from_turn_value,
    messages_of,
    to_body,
    to_turn_body,
)
from app.stores.redis.keys import tag_of
from app.stores.sealing import Sealer

LATEST_MS = 253_402_300_799_999
"""The end of the year 9999; a time behind it is no time."""

_STATUSES = (TurnStatus.RUNNING, TurnStatus.FINISHED, TurnStatus.FAILED, TurnStatus.CANCELLED)
_CODES = {status: code for code, status in enumerate(_STATUSES)}
NO_ID = bytes(16)
_TURN = struct.Struct(">16sBBIqqIH")  # the first 22 bytes are known to lua/common.lua
_TURN_COVER = b"t"  # each kind of value has a letter, which begins its cover: that of its room
BROKEN = (SnapshotUnreadable, struct.error, TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True, slots=True)
class Record:
    """A session as Redis has it: what the domain knows of it, and what only the store does.

    ``token`` is that of its last write. ``state_number`` is the number under which its state is
    kept, ``None`` if it is not kept yet or empty; ``root_state`` that of the state it was created with.
    ``states`` and ``facts`` count those there ever were, ``fact_ms`` is the time of the last fact.
    """

    session: Session
    token: bytes
    json: bytes = b""
    state_number: int | None = None
    root_state: int | None = None
    states: int = 0
    facts: int = 0
    fact_ms: int = 0

    @property
    def uid(self) -> bytes:
        return to_id_bytes(self.session.uid)

    @property
    def tag(self) -> str:
        return tag_of(self.session.key)


class TurnRow(NamedTuple):
    """A turn's row taken apart.

    ``body`` is sealed with ``cover``: its session's uid, the turn's id, and the ``head``, which is all
    that is before it.
    """

    turn_id: bytes
    parent: bytes | None
    depth: int
    status: TurnStatus
    kept: bool
    started_at: int
    finished_at: int | None
    state: int | None
    names: bytes
    head: bytes
    body: bytes
    cover: bytes

    @property
    def is_committed(self) -> bool:
        return self.status is TurnStatus.FINISHED or (self.status is TurnStatus.CANCELLED and self.kept)


def to_json(sealer: Sealer, session: Session) -> bytes:
    """Return the sealed JSON of a record, nothing if all of it is empty."""
    if not (session.params or session.metadata or session.state) and session.template is None:
        return b""
    value = [session.params, session.metadata, session.template, session.state]
    return sealer.seal(to_body(value), _json_cover(session.uid))


def to_record(sealer: Sealer, record: Record) -> bytes:
    """Return the sealed record, without its JSON and its token."""
    s = record.session
    value = [
        s.uid, s.app_name, s.agent_id, s.created_at, s.updated_at, s.last_accessed, s.expires_at, s.user_id,
        s.window_id, s.title, s.provider, s.model, s.ttl_s, s.archived, s.marked_idle, s.head, s.note,
        s.depth, s.rev, s.state_rev, record.state_number, record.root_state, record.states, record.facts,
        record.fact_ms, crc32(record.json),
    ]  # fmt: skip
    return sealer.seal(to_body(value), _record_cover(s.key))


def from_record(sealer: Sealer, key: SessionKey, raw: Any, json: Any, token: Any) -> Record:
    """Return the record.

    Raises:
        SnapshotUnreadable: it is broken.
    """
    try:
        json = json or b""
        (
            uid, app_name, agent_id, created_at, updated_at, last_accessed, expires_at, user_id,
            window_id, title, provider, model, ttl_s, archived, marked_idle, head, note, depth,
            rev, state_rev, state_number, root_state, states, facts, fact_ms, checksum,
        ) = sealer.open(raw, _record_cover(key))  # fmt: skip
        if crc32(json) != checksum:
            raise SnapshotUnreadable(session_id=key.session_id)
        params, metadata, template, state = (
            sealer.open(json, _json_cover(uid)) if json else ({}, {}, None, {})
        )
        session = Session(
            key=key, uid=uid, app_name=app_name, agent_id=agent_id, created_at=created_at,
            updated_at=updated_at, last_accessed=last_accessed, expires_at=expires_at, user_id=user_id,
            window_id=window_id, title=title, provider=provider, model=model, params=params,
            metadata=metadata, template=template, ttl_s=ttl_s, archived=archived, marked_idle=marked_idle,
            head=head, note=note, depth=depth, rev=rev, state=state, state_rev=state_rev,
        )  # fmt: skip
        return Record(session, token or b"", json, state_number, root_state, states, facts, fact_ms)
    except BROKEN as error:
        raise SnapshotUnreadable(session_id=key.session_id) from error


def to_turn(sealer: Sealer, uid: bytes, turn: Turn, state: int | None) -> bytes:
    """Return the row of a turn; ``state`` is the number of the session's state at its commit."""
    names = "\0".join((turn.agent_id, turn.provider, turn.model, turn.boot_id)).encode(
        "utf-8", "surrogatepass"
    )
    head = _TURN.pack(
        to_id(turn.parent), _CODES[turn.status], turn.kept, turn.depth, turn.started_at,
        -1 if turn.finished_at is None else turn.finished_at, state or 0, len(names),
    )  # fmt: skip
    cover = _TURN_COVER + uid + to_id_bytes(turn.turn_id) + head + names
    return head + names + sealer.seal(to_turn_body(turn), cover)


def to_turn_of(sealer: Sealer, uid: bytes, row: TurnRow, session_id: str) -> bytes:
    """Return the row of the same turn for the session with this uid; ``session_id`` is whose it was.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        body = sealer.open_body(row.body, row.cover)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=session_id, turn_id=_shown(row.turn_id)) from error
    return row.head + sealer.seal(body, _TURN_COVER + uid + row.turn_id + row.head)


def take_apart(uid: bytes, turn_id: bytes, raw: bytes) -> TurnRow:
    """Return what a row says, its seal not looked at.

    Raises:
        SnapshotUnreadable: it is no row.
    """
    try:
        parent, status, kept, depth, started_at, finished_at, state, size = _TURN.unpack_from(raw)
        end = _TURN.size + size
        return TurnRow(
            turn_id, None if parent == NO_ID else parent, depth, _STATUSES[status], bool(kept), started_at,
            None if finished_at == -1 else finished_at, state or None, raw[_TURN.size : end], raw[:end],
            raw[end:], _TURN_COVER + uid + turn_id + raw[:end],
        )  # fmt: skip
    except BROKEN as error:
        raise SnapshotUnreadable(turn_id=_shown(turn_id)) from error


def from_turn(
    sealer: Sealer, uid: bytes, turn_id: bytes, raw: bytes, session_id: str, *, on_branch: bool = False
) -> Turn:
    """Return the turn.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        row = take_apart(uid, turn_id, raw)
        agent_id, provider, model, boot_id = row.names.decode("utf-8", "surrogatepass").split("\0")
        columns = TurnColumns(
            turn_id=from_id_bytes(turn_id),
            parent=from_id(row.parent),
            depth=row.depth,
            status=row.status,
            kept=row.kept,
            agent_id=agent_id,
            provider=provider,
            model=model,
            boot_id=boot_id,
            started_at=row.started_at,
            finished_at=row.finished_at,
        )
        return from_turn_value(columns, sealer.open(row.body, row.cover), on_branch=on_branch)
    except BROKEN as error:
        raise SnapshotUnreadable(session_id=session_id, turn_id=_shown(turn_id)) from error


def checked(sealer: Sealer, uid: bytes, turn_id: bytes, raw: bytes, session_id: str) -> TurnRow:
    """Return what a row says.

    Raises:
        SnapshotUnreadable: it is broken.
    """
    from_turn(sealer, uid, turn_id, raw, session_id)
    return take_apart(uid, turn_id, raw)


def messages_and_size(sealer: Sealer, row: TurnRow, session_id: str) -> tuple[tuple[Any, ...], int]:
    """Return the messages of a turn and the length of its body.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        return messages_of(sealer.open(row.body, row.cover)), len(row.body)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=session_id, turn_id=_shown(row.turn_id)) from error


def show_turn(
    sealer: Sealer,
    uid: bytes,
    turn_id: bytes,
    raw: bytes,
    started_at: int,
    session_id: str,
    *,
    on_branch: bool,
) -> Turn | None:
    """Return the turn; of a broken row a failed one with what it shows, ``None`` without even an id."""
    try:
        return from_turn(sealer, uid, turn_id, raw, session_id, on_branch=on_branch)
    except SnapshotUnreadable as error:
        shown_id = _shown(turn_id)
        return None if shown_id is None else _unreadable(shown_id, started_at, error, on_branch=on_branch)


def _unreadable(turn_id: str, started_at: int, error: SnapshotUnreadable, *, on_branch: bool) -> Turn:
    return Turn(
        turn_id=turn_id,
        parent=None,
        depth=0,
        status=TurnStatus.FAILED,
        input="",
        agent_id="",
        provider="",
        model="",
        activation=Activation.RESTORED,
        started_at=started_at if 0 <= started_at <= LATEST_MS else 0,
        boot_id="",
        error=TurnError(error.code, SnapshotUnreadable().detail),
        on_branch=on_branch,
    )


def _record_cover(key: SessionKey) -> bytes:
    return b"r" + tag_of(key).encode()


def _json_cover(uid: str) -> bytes:
    return b"j" + to_id_bytes(uid)


def to_id(text: str | None) -> bytes:
    return NO_ID if text is None else to_id_bytes(text)


def from_id(raw: bytes | None) -> str | None:
    return None if raw is None else from_id_bytes(raw)


def to_raw_id(text: str) -> bytes | None:
    """Return the bytes of an id that somebody names, ``None`` if it is none."""
    try:
        return to_id_bytes(text)
    except ValueError:
        return None


def _shown(raw: bytes) -> str | None:
    return from_id_bytes(raw) if len(raw) == 16 else None
