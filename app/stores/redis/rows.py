"""What Redis keeps of sessions <-> domain values, each checked against its seal.

A session's record is two sealed values: a short one that every turn writes, and its JSON, which
only a change of it writes; the first vouches for the second. A turn is a fixed head, which the
scripts read, too, its names, and its sealed body.
"""

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

from app.domain.checkpoint import Checkpoint
from app.domain.compaction import Note
from app.domain.errors import SnapshotUnreadable
from app.domain.ids import SessionKey, from_id_bytes, to_id_bytes
from app.domain.journal import LoggedFact
from app.domain.session import Session
from app.domain.state import SharedState
from app.domain.turn import Activation, JsonObject, Turn, TurnError, TurnStatus
from app.stores.codec import (
    TurnColumns,
    from_fact_value,
    from_turn_value,
    messages_of,
    seal,
    to_body,
    to_fact_value,
    to_turn_body,
    unseal,
)
from app.stores.redis.keys import tag_of

LATEST_MS = 253_402_300_799_999
"""The end of the year 9999; a time behind it is no time."""

_STATUSES = (TurnStatus.RUNNING, TurnStatus.FINISHED, TurnStatus.FAILED, TurnStatus.CANCELLED)
_CODES = {status: code for code, status in enumerate(_STATUSES)}
_NO_ID = bytes(16)
_TURN = struct.Struct(">16sBBIqqIH")  # the first 22 bytes are known to lua/common.lua
_NOTE = struct.Struct(">16sIIqqq")
_NOTED = struct.Struct(">16sII")
_CHECKPOINT = struct.Struct(">16sIBq")
_NUMBER = struct.Struct(">Q")
_BROKEN = (SnapshotUnreadable, struct.error, TypeError, ValueError, AttributeError, LookupError)


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
    """A turn's row taken apart; ``body`` is sealed with all that is before it."""

    turn_id: bytes
    parent: bytes | None
    depth: int
    status: TurnStatus
    kept: bool
    started_at: int
    finished_at: int | None
    state: int | None
    names: bytes
    body: bytes
    cover: bytes

    @property
    def is_committed(self) -> bool:
        return self.status is TurnStatus.FINISHED or (self.status is TurnStatus.CANCELLED and self.kept)


class Noted(NamedTuple):
    """Where a note hangs; of two on a turn that with the higher ``number`` is the later one."""

    note_id: bytes
    turn_id: bytes
    depth: int
    number: int


def to_json(session: Session) -> bytes:
    """Return the sealed JSON of a record, nothing if all of it is empty."""
    if not (session.params or session.metadata or session.state) and session.template is None:
        return b""
    value = [session.params, session.metadata, session.template, session.state]
    return seal(to_body(value), to_id_bytes(session.uid))


def to_record(record: Record) -> bytes:
    """Return the sealed record, without its JSON and its token."""
    s = record.session
    value = [
        s.uid, s.app_name, s.agent_id, s.created_at, s.updated_at, s.last_accessed, s.expires_at, s.user_id,
        s.window_id, s.title, s.provider, s.model, s.ttl_s, s.archived, s.marked_idle, s.head, s.note, s.depth,
        s.rev, s.state_rev, record.state_number, record.root_state, record.states, record.facts, record.fact_ms,
        crc32(record.json),
    ]  # fmt: skip
    return seal(to_body(value), tag_of(s.key).encode())


def from_record(key: SessionKey, raw: Any, json: Any, token: Any) -> Record:
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
        ) = unseal(raw, tag_of(key).encode())  # fmt: skip
        if crc32(json) != checksum:
            raise SnapshotUnreadable(session_id=key.session_id)
        params, metadata, template, state = unseal(json, to_id_bytes(uid)) if json else ({}, {}, None, {})
        session = Session(
            key=key, uid=uid, app_name=app_name, agent_id=agent_id, created_at=created_at,
            updated_at=updated_at, last_accessed=last_accessed, expires_at=expires_at, user_id=user_id,
            window_id=window_id, title=title, provider=provider, model=model, params=params,
            metadata=metadata, template=template, ttl_s=ttl_s, archived=archived, marked_idle=marked_idle,
            head=head, note=note, depth=depth, rev=rev, state=state, state_rev=state_rev,
        )  # fmt: skip
        return Record(session, token or b"", json, state_number, root_state, states, facts, fact_ms)
    except _BROKEN as error:
        raise SnapshotUnreadable(session_id=key.session_id) from error


def to_turn(turn: Turn, state: int | None, body: bytes | None = None) -> bytes:
    """Return the row of a turn; ``state`` is the number of the session's state at its commit."""
    names = "\0".join((turn.agent_id, turn.provider, turn.model, turn.boot_id)).encode(
        "utf-8", "surrogatepass"
    )
    head = _TURN.pack(
        to_id(turn.parent), _CODES[turn.status], turn.kept, turn.depth, turn.started_at,
        -1 if turn.finished_at is None else turn.finished_at, state or 0, len(names),
    )  # fmt: skip
    cover = to_id_bytes(turn.turn_id) + head + names
    return head + names + seal(to_turn_body(turn) if body is None else body, cover)


def take_apart(turn_id: bytes, raw: bytes) -> TurnRow:
    """Return what a row says, its seal not looked at.

    Raises:
        SnapshotUnreadable: it is no row.
    """
    try:
        parent, status, kept, depth, started_at, finished_at, state, size = _TURN.unpack_from(raw)
        end = _TURN.size + size
        return TurnRow(
            turn_id, None if parent == _NO_ID else parent, depth, _STATUSES[status], bool(kept), started_at,
            None if finished_at == -1 else finished_at, state or None, raw[_TURN.size : end], raw[end:],
            turn_id + raw[:end],
        )  # fmt: skip
    except _BROKEN as error:
        raise SnapshotUnreadable(turn_id=_shown(turn_id)) from error


def from_turn(turn_id: bytes, raw: bytes, session_id: str, *, on_branch: bool = False) -> Turn:
    """Return the turn.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        row = take_apart(turn_id, raw)
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
        return from_turn_value(columns, unseal(row.body, row.cover), on_branch=on_branch)
    except _BROKEN as error:
        raise SnapshotUnreadable(session_id=session_id, turn_id=_shown(turn_id)) from error


def checked(turn_id: bytes, raw: bytes, session_id: str) -> TurnRow:
    """Return what a row says.

    Raises:
        SnapshotUnreadable: it is broken.
    """
    from_turn(turn_id, raw, session_id)
    return take_apart(turn_id, raw)


def messages_and_size(row: TurnRow, session_id: str) -> tuple[tuple[Any, ...], int]:
    """Return the messages of a turn and the length of its body.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        return messages_of(unseal(row.body, row.cover)), len(row.body)
    except SnapshotUnreadable as error:
        raise SnapshotUnreadable(session_id=session_id, turn_id=_shown(row.turn_id)) from error


def show_turn(
    turn_id: bytes, raw: bytes, started_at: int, session_id: str, *, on_branch: bool
) -> Turn | None:
    """Return the turn; of a broken row a failed one with what it shows, ``None`` without even an id."""
    try:
        return from_turn(turn_id, raw, session_id, on_branch=on_branch)
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


def to_state(uid: bytes, number: int, state: JsonObject) -> bytes:
    return seal(to_body(state), uid + _NUMBER.pack(number))


def from_state(uid: bytes, number: int, raw: Any) -> JsonObject:
    """Return the state.

    Raises:
        SnapshotUnreadable: it is broken, or missing.
    """
    state = unseal(raw, uid + _NUMBER.pack(number))
    if not isinstance(state, dict):
        raise SnapshotUnreadable
    return state


def to_note(uid: bytes, note: Note, depth: int, number: int) -> tuple[bytes, bytes]:
    """Return the note, and where it hangs."""
    turn_id = to_id_bytes(note.turn_id)
    head = _NOTE.pack(turn_id, depth, number, note.tokens_before, note.tokens_after, note.created_at)
    body = seal(to_body(note.summary), uid + to_id_bytes(note.note_id) + head)
    return head + body, _NOTED.pack(turn_id, depth, number)


def from_note(uid: bytes, note_id: bytes, raw: Any) -> tuple[Note, Noted]:
    """Return the note, and where it hangs.

    Raises:
        SnapshotUnreadable: it is broken, or missing.
    """
    try:
        turn_id, depth, number, tokens_before, tokens_after, created_at = _NOTE.unpack_from(raw)
        note = Note(
            note_id=from_id_bytes(note_id),
            turn_id=from_id_bytes(turn_id),
            summary=unseal(raw[_NOTE.size :], uid + note_id + raw[: _NOTE.size]),
            tokens_before=tokens_before,
            tokens_after=tokens_after,
            created_at=created_at,
        )
        return note, Noted(note_id, turn_id, depth, number)
    except _BROKEN as error:
        raise SnapshotUnreadable from error


def from_noted(note_id: bytes, raw: bytes) -> Noted | None:
    """Return where a note hangs, ``None`` if that cannot be read."""
    return Noted(note_id, *_NOTED.unpack(raw)) if len(raw) == _NOTED.size else None


def to_checkpoint(uid: bytes, checkpoint: Checkpoint, state: int | None) -> bytes:
    """Return the row of a checkpoint; ``state`` is the number of its state."""
    head = _CHECKPOINT.pack(
        to_id(checkpoint.turn_id), state or 0, checkpoint.automatic, checkpoint.created_at
    )
    cover = uid + to_id_bytes(checkpoint.checkpoint_id) + head
    return head + seal(to_body([checkpoint.label, checkpoint.data]), cover)


def from_checkpoint(uid: bytes, checkpoint_id: bytes, raw: bytes) -> tuple[Checkpoint, int | None]:
    """Return the checkpoint and the number of its state.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        turn_id, state, automatic, created_at = _CHECKPOINT.unpack_from(raw)
        label, data = unseal(raw[_CHECKPOINT.size :], uid + checkpoint_id + raw[: _CHECKPOINT.size])
        checkpoint = Checkpoint(
            checkpoint_id=from_id_bytes(checkpoint_id),
            turn_id=None if turn_id == _NO_ID else from_id_bytes(turn_id),
            label=label,
            data=data,
            created_at=created_at,
            automatic=bool(automatic),
        )
        return checkpoint, state or None
    except _BROKEN as error:
        raise SnapshotUnreadable from error


def to_fact(uid: bytes, logged: LoggedFact) -> bytes:
    """Return the member that stands for a fact: its number, by which those of one time are sorted, first."""
    number = _NUMBER.pack(logged.number)
    return number + seal(to_body([logged.created_at, to_fact_value(logged.fact)]), uid + number)


def from_fact(uid: bytes, member: bytes) -> LoggedFact:
    """Return the fact.

    Raises:
        SnapshotUnreadable: it is broken.
    """
    try:
        created_at, value = unseal(member[8:], uid + member[:8])
        return LoggedFact(_NUMBER.unpack(member[:8])[0], created_at, from_fact_value(value))
    except _BROKEN as error:
        raise SnapshotUnreadable from error


def fact_low(number: int) -> bytes:
    """Return what no fact from this number on is before."""
    return _NUMBER.pack(number)


def to_bound(name: str, tag: str, turn_id: bytes, fingerprint: bytes) -> bytes:
    """Return the seal of an idempotency key, which holds its fingerprint."""
    return seal(to_body(fingerprint.hex()), b"\0".join((name.encode(), tag.encode(), turn_id)))


def from_bound(name: str, tag: bytes, turn_id: bytes, raw: bytes) -> bytes:
    """Return the fingerprint.

    Raises:
        SnapshotUnreadable: the key is broken.
    """
    try:
        return bytes.fromhex(unseal(raw, b"\0".join((name.encode(), tag, turn_id))))
    except _BROKEN as error:
        raise SnapshotUnreadable from error


def to_shared(name: str, shared: SharedState, updated_at: int) -> bytes:
    return seal(to_body([shared.rev, updated_at, shared.values]), name.encode())


def from_shared(name: str, raw: Any) -> SharedState:
    """Return the state.

    Raises:
        SnapshotUnreadable: it is broken.
    """
    try:
        rev, _, values = unseal(raw, name.encode())
        if not isinstance(values, dict):
            raise SnapshotUnreadable
        return SharedState(values, rev)
    except _BROKEN as error:
        raise SnapshotUnreadable from error


def to_id(text: str | None) -> bytes:
    return _NO_ID if text is None else to_id_bytes(text)


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
