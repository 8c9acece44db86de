"""What Redis keeps beside a session's record and its turns <-> domain values, each checked against its seal.

What is a session's is sealed with its uid, so that none counts for another one, and each kind with a
letter of its own.
"""

import struct
from typing import Any, NamedTuple

from app.domain.checkpoint import Checkpoint
from app.domain.compaction import Note
from app.domain.errors import SnapshotUnreadable
from app.domain.ids import from_id_bytes, to_id_bytes
from app.domain.journal import LoggedFact
from app.domain.state import SharedState
from app.domain.turn import JsonObject
from app.stores.codec import from_fact_value, to_body, to_fact_value
from app.stores.redis.rows import BROKEN, NO_ID, to_id
from app.stores.sealing import Sealer

_NOTE = struct.Struct(">16sIIqqq")
_NOTED = struct.Struct(">16sII")
_CHECKPOINT = struct.Struct(">16sIBq")
_NUMBER = struct.Struct(">Q")


class Noted(NamedTuple):
    """Where a note hangs; of two on a turn that with the higher ``number`` is the later one."""

    note_id: bytes
    turn_id: bytes
    depth: int
    number: int


def to_state(sealer: Sealer, uid: bytes, number: int, state: JsonObject) -> bytes:
    return sealer.seal(to_body(state), b"k" + uid + _NUMBER.pack(number))


def from_state(sealer: Sealer, uid: bytes, number: int, raw: Any) -> JsonObject:
    """Return the state.

    Raises:
        SnapshotUnreadable: it is broken, or missing.
    """
    state = sealer.open(raw, b"k" + uid + _NUMBER.pack(number))
    if not isinstance(state, dict):
        raise SnapshotUnreadable
    return state


def to_note(sealer: Sealer, uid: bytes, note: Note, depth: int, number: int) -> tuple[bytes, bytes]:
    """Return the note, and where it hangs."""
    turn_id = to_id_bytes(note.turn_id)
    head = _NOTE.pack(turn_id, depth, number, note.tokens_before, note.tokens_after, note.created_at)
    body = sealer.seal(to_body(note.summary), b"n" + uid + to_id_bytes(note.note_id) + head)
    return head + body, _NOTED.pack(turn_id, depth, number)


def from_note(sealer: Sealer, uid: bytes, note_id: bytes, raw: Any) -> tuple[Note, Noted]:
    """Return the note, and where it hangs.

    Raises:
        SnapshotUnreadable: it is broken, or missing.
    """
    try:
        turn_id, depth, number, tokens_before, tokens_after, created_at = _NOTE.unpack_from(raw)
        note = Note(
            note_id=from_id_bytes(note_id),
            turn_id=from_id_bytes(turn_id),
            summary=sealer.open(raw[_NOTE.size :], b"n" + uid + note_id + raw[: _NOTE.size]),
            tokens_before=tokens_before,
            tokens_after=tokens_after,
            created_at=created_at,
        )
        return note, Noted(note_id, turn_id, depth, number)
    except BROKEN as error:
        raise SnapshotUnreadable from error


def from_noted(note_id: bytes, raw: bytes) -> Noted | None:
    """Return where a note hangs, ``None`` if that cannot be read."""
    return Noted(note_id, *_NOTED.unpack(raw)) if len(raw) == _NOTED.size else None


def to_checkpoint(sealer: Sealer, uid: bytes, checkpoint: Checkpoint, state: int | None) -> bytes:
    """Return the row of a checkpoint; ``state`` is the number of its state."""
    head = _CHECKPOINT.pack(
        to_id(checkpoint.turn_id), state or 0, checkpoint.automatic, checkpoint.created_at
    )
    cover = b"c" + uid + to_id_bytes(checkpoint.checkpoint_id) + head
    return head + sealer.seal(to_body([checkpoint.label, checkpoint.data]), cover)


def from_checkpoint(
    sealer: Sealer, uid: bytes, checkpoint_id: bytes, raw: bytes
) -> tuple[Checkpoint, int | None]:
    """Return the checkpoint and the number of its state.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        turn_id, state, automatic, created_at = _CHECKPOINT.unpack_from(raw)
        label, data = sealer.open(
            raw[_CHECKPOINT.size :], b"c" + uid + checkpoint_id + raw[: _CHECKPOINT.size]
        )
        checkpoint = Checkpoint(
            checkpoint_id=from_id_bytes(checkpoint_id),
            turn_id=None if turn_id == NO_ID else from_id_bytes(turn_id),
            label=label,
            data=data,
            created_at=created_at,
            automatic=bool(automatic),
        )
        return checkpoint, state or None
    except BROKEN as error:
        raise SnapshotUnreadable from error


def to_fact(sealer: Sealer, uid: bytes, logged: LoggedFact) -> bytes:
    """Return the member that stands for a fact: its number, by which those of one time are sorted, first."""
    number = _NUMBER.pack(logged.number)
    return number + sealer.seal(to_body([logged.created_at, to_fact_value(logged.fact)]), b"f" + uid + number)


def from_fact(sealer: Sealer, uid: bytes, member: bytes) -> LoggedFact:
    """Return the fact.

    Raises:
        SnapshotUnreadable: it is broken.
    """
    try:
        created_at, value = sealer.open(member[8:], b"f" + uid + member[:8])
        return LoggedFact(_NUMBER.unpack(member[:8])[0], created_at, from_fact_value(value))
    except BROKEN as error:
        raise SnapshotUnreadable from error


def fact_low(number: int) -> bytes:
    """Return what no fact from this number on is before."""
    return _NUMBER.pack(number)


def to_bound(sealer: Sealer, name: str, tag: str, turn_id: bytes, fingerprint: bytes) -> bytes:
    """Return the seal of an idempotency key, which holds its fingerprint."""
    return sealer.seal(to_body(fingerprint.hex()), _bound_cover(name, tag.encode(), turn_id))


def from_bound(sealer: Sealer, name: str, tag: bytes, turn_id: bytes, raw: bytes) -> bytes:
    """Return the fingerprint.

    Raises:
        SnapshotUnreadable: the key is broken.
    """
    try:
        return bytes.fromhex(sealer.open(raw, _bound_cover(name, tag, turn_id)))
    except BROKEN as error:
        raise SnapshotUnreadable from error


def to_shared(sealer: Sealer, name: str, shared: SharedState, updated_at: int) -> bytes:
    return sealer.seal(to_body([shared.rev, updated_at, shared.values]), b"h" + name.encode())


def from_shared(sealer: Sealer, name: str, raw: Any) -> SharedState:
    """Return the state.

    Raises:
        SnapshotUnreadable: it is broken.
    """
    try:
        rev, _, values = sealer.open(raw, b"h" + name.encode())
        if not isinstance(values, dict):
            raise SnapshotUnreadable
        return SharedState(values, rev)
    except BROKEN as error:
        raise SnapshotUnreadable from error


def _bound_cover(name: str, tag: bytes, turn_id: bytes) -> bytes:
    return b"\0".join((b"b", name.encode(), tag, turn_id))
