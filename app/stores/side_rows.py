"""Rows of what hangs on a session beside its turns <-> domain values, as both databases with SQL have them.

Each is checked against its seal, which is made with the ``uid`` of its session: none counts for another one.
No two kinds of rows have covers of the same length, so that none counts for another kind either.
"""

import struct
from collections.abc import Sequence
from typing import Any

from app.domain.checkpoint import Checkpoint
from app.domain.compaction import Note
from app.domain.errors import SnapshotUnreadable
from app.domain.ids import from_id_bytes, to_id_bytes
from app.domain.journal import Fact, LoggedFact
from app.domain.state import SharedState, StateScope
from app.domain.turn import JsonObject
from app.stores.codec import from_fact_value, to_body, to_fact_value
from app.stores.sealing import Sealer, is_encrypted

Row = Sequence[Any]

NOTE_COLUMNS = "note_id, turn_id, depth, tokens_before, tokens_after, created_at, body"
CHECKPOINT_COLUMNS = "checkpoint_id, turn_id, state, automatic, created_at, body"
FACT_COLUMNS = "number, created_at, body"

_NO_ID = bytes(16)
_PLAIN_FINGERPRINT_MAX = 32
"""Bytes; what is encrypted is always longer."""
_NOTE_COVER = struct.Struct(">16s16s16sqqqq")
_CHECKPOINT_COVER = struct.Struct(">16s16s16sqBq")
_FACT_COVER = struct.Struct(">16sqq")
_STATE_COVER = struct.Struct(">16sq")
_BROKEN = (SnapshotUnreadable, struct.error, TypeError, ValueError, AttributeError)


def to_id(text: str | None) -> bytes | None:
    return None if text is None else to_id_bytes(text)


def from_id(raw: bytes | None) -> str | None:
    return None if raw is None else from_id_bytes(raw)


def to_state_body(sealer: Sealer, uid: bytes, number: int, state: JsonObject) -> bytes:
    return sealer.seal(to_body(state), _STATE_COVER.pack(uid, number))


def from_state_body(sealer: Sealer, uid: bytes, number: int, body: Any) -> JsonObject:
    """Return the state.

    Raises:
        SnapshotUnreadable: the row is broken, or missing.
    """
    state = sealer.open(body, _STATE_COVER.pack(uid, number))
    if not isinstance(state, dict):
        raise SnapshotUnreadable
    return state


def to_note_row(sealer: Sealer, uid: bytes, note: Note, depth: int) -> tuple[Any, ...]:
    """Return the values of ``NOTE_COLUMNS``."""
    columns = (
        to_id_bytes(note.note_id), to_id_bytes(note.turn_id), depth,
        note.tokens_before, note.tokens_after, note.created_at,
    )  # fmt: skip
    return (*columns, sealer.seal(to_body(note.summary), _NOTE_COVER.pack(uid, *columns)))


def from_note_row(sealer: Sealer, uid: bytes, row: Row | None) -> Note:
    """Return the note in the values of ``NOTE_COLUMNS``.

    Raises:
        SnapshotUnreadable: the row is broken, or missing.
    """
    try:
        note_id, turn_id, depth, tokens_before, tokens_after, created_at, body = row or ()
        cover = _NOTE_COVER.pack(uid, note_id, turn_id, depth, tokens_before, tokens_after, created_at)
        return Note(
            note_id=from_id_bytes(note_id),
            turn_id=from_id_bytes(turn_id),
            summary=sealer.open(body, cover),
            tokens_before=tokens_before,
            tokens_after=tokens_after,
            created_at=created_at,
        )
    except _BROKEN as error:
        raise SnapshotUnreadable from error


def to_checkpoint_row(
    sealer: Sealer, uid: bytes, checkpoint: Checkpoint, state: int | None
) -> tuple[Any, ...]:
    """Return the values of ``CHECKPOINT_COLUMNS``; ``state`` is the number of the state."""
    columns = (
        to_id_bytes(checkpoint.checkpoint_id), to_id(checkpoint.turn_id), state,
        int(checkpoint.automatic), checkpoint.created_at,
    )  # fmt: skip
    return (
        *columns,
        sealer.seal(to_body([checkpoint.label, checkpoint.data]), _checkpoint_cover(uid, columns)),
    )


def from_checkpoint_row(sealer: Sealer, uid: bytes, row: Row) -> Checkpoint:
    """Return the checkpoint in the values of ``CHECKPOINT_COLUMNS``.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        label, data = sealer.open(row[5], _checkpoint_cover(uid, row))
        return Checkpoint(
            checkpoint_id=from_id_bytes(row[0]),
            turn_id=from_id(row[1]),
            label=label,
            data=data,
            created_at=row[4],
            automatic=bool(row[3]),
        )
    except _BROKEN as error:
        raise SnapshotUnreadable from error


def to_fact_row(sealer: Sealer, uid: bytes, logged: LoggedFact) -> tuple[Any, ...]:
    """Return the values of ``FACT_COLUMNS``."""
    columns = logged.number, logged.created_at
    return (*columns, sealer.seal(to_body(to_fact_value(logged.fact)), _FACT_COVER.pack(uid, *columns)))


def from_fact_row(sealer: Sealer, uid: bytes, row: Row) -> LoggedFact:
    """Return the fact in the values of ``FACT_COLUMNS``.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        fact: Fact = from_fact_value(sealer.open(row[2], _FACT_COVER.pack(uid, row[0], row[1])))
        return LoggedFact(row[0], row[1], fact)
    except _BROKEN as error:
        raise SnapshotUnreadable from error


def to_shared_body(sealer: Sealer, scope: StateScope, shared: SharedState, updated_at: int) -> bytes:
    return sealer.seal(to_body(shared.values), _shared_cover(scope, shared.rev, updated_at))


def from_shared_row(sealer: Sealer, scope: StateScope, row: Row) -> SharedState:
    """Return the state in (rev, updated_at, body).

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    rev, updated_at, body = row
    values = sealer.open(body, _shared_cover(scope, rev, updated_at))
    if not isinstance(values, dict):
        raise SnapshotUnreadable
    return SharedState(values, rev)


def to_fingerprint(sealer: Sealer, owner: str, key: str, turn_id: bytes, fingerprint: bytes) -> bytes:
    """Return how the fingerprint of an idempotency key is stored.

    With keys it is encrypted: whoever has it can try out which message it is of.
    """
    if not sealer.encrypts:
        return fingerprint
    return sealer.seal(to_body(fingerprint.hex()), _fingerprint_cover(owner, key, turn_id))


def from_fingerprint(sealer: Sealer, owner: str, key: str, turn_id: bytes, stored: bytes) -> bytes:
    """Return the fingerprint.

    Raises:
        SnapshotUnreadable: it is broken, or its key is missing.
    """
    if len(stored) <= _PLAIN_FINGERPRINT_MAX or not is_encrypted(stored):
        return stored
    try:
        return bytes.fromhex(sealer.open(stored, _fingerprint_cover(owner, key, turn_id)))
    except _BROKEN as error:
        raise SnapshotUnreadable from error


def _fingerprint_cover(owner: str, key: str, turn_id: bytes) -> bytes:
    return f"key\0{owner}\0{key}\0".encode() + turn_id


def _checkpoint_cover(uid: bytes, row: Row) -> bytes:
    checkpoint_id, turn_id, state, automatic, created_at = row[:5]
    return _CHECKPOINT_COVER.pack(
        uid, checkpoint_id, _NO_ID if turn_id is None else turn_id, state or 0, automatic, created_at
    )


def _shared_cover(scope: StateScope, rev: Any, updated_at: Any) -> bytes:
    return "\0".join([scope.app_name, scope.owner, scope.user_id or "", f"{rev}", f"{updated_at}"]).encode()
