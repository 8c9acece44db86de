"""Rows of the PostgreSQL schema <-> domain values, each checked against its seal."""

import logging
import struct
from secrets import randbits
from typing import Any, NamedTuple

from app.domain.errors import SnapshotUnreadable
from app.domain.ids import SessionKey, from_id_bytes, to_id_bytes
from app.domain.session import Session
from app.domain.turn import Activation, ContextMessage, Turn, TurnError, TurnStatus
from app.stores import rules
from app.stores.codec import (
    TurnColumns,
    from_turn_value,
    messages_of,
    session_seal,
)
from app.stores.sealing import Sealer
from app.stores.session_texts import COLUMNS, Stored, from_text, from_title, to_texts
from app.stores.side_rows import Row, from_id, to_id

SESSION_COLUMNS = (
    "owner, session_id, uid, app_name, user_id, window_id, agent_id, title, title_folded, provider, model,"
    " params, metadata, template, ttl_s, archived, marked_idle, created_at, updated_at, last_accessed,"
    " expires_at, head, note, depth, rev, state, state_rev, state_number, root_state, last_state, seal"
)
RECORD_COLUMNS = f"{SESSION_COLUMNS}, id, stamp"
TURN_COLUMNS = (
    "turn_id, parent, depth, status, kept, agent_id, provider, model, boot_id, started_at, finished_at,"
    " state, body"
)

LATEST_MS = 253_402_300_799_999
"""The end of the year 9999; a time behind it is no time."""

STATUSES = (TurnStatus.RUNNING, TurnStatus.FINISHED, TurnStatus.FAILED, TurnStatus.CANCELLED)
CODES = {status: code for code, status in enumerate(STATUSES)}
RUNNING = 0
ABANDONED = 4
"""A turn that ran when its lease ran out: its row is the start record but for this number."""

_COVER = struct.Struct(">16s16s16sqBBqqq")
_NO_ID = bytes(16)
_SEALED = b"\xff"  # no UTF-8 has it: RFC 3629, section 3
_OBJECTS = COLUMNS[1:]
_BROKEN = (SnapshotUnreadable, struct.error, TypeError, ValueError, IndexError, AttributeError)


_log = logging.getLogger(__name__)


class Record(NamedTuple):
    """A session as the database has it: what the domain knows of it, and what only the store does.

    ``state_number`` is the number under which its state is kept, ``None`` if it is not kept
    yet or empty; ``root_state`` that of the state it was created with, ``None`` if that was empty;
    ``last_state`` the highest one given so far. ``stamp`` is drawn at random for each write and so tells this
    record from every other, also from one that a crash of the server took back. ``texts`` are
    ``session_texts.COLUMNS`` as they are stored.
    """

    session: Session
    state_number: int | None
    root_state: int | None
    last_state: int
    number: int
    stamp: int
    texts: tuple[Stored, ...]

    @property
    def uid(self) -> bytes:
        return to_id_bytes(self.session.uid)

    def after_write(
        self, sealer: Sealer, session: Session, state_number: int | None, last_state: int
    ) -> "Record":
        """Return the record after its next write."""
        return self._replace(
            session=session,
            state_number=state_number,
            last_state=last_state,
            stamp=new_stamp(),
            texts=self._texts_of(sealer, session),
        )

    @property
    def seal(self) -> int:
        numbers = self.state_number, self.root_state, self.last_state
        return session_seal(self.session, self.texts, numbers)

    def _texts_of(self, sealer: Sealer, session: Session) -> tuple[Stored, ...]:
        # Sealed anew, a text is another one, and the end of a turn writes none of them but the state.
        is_same, is_state_same = session.rev == self.session.rev, session.state_rev == self.session.state_rev
        if is_same and is_state_same:
            return self.texts
        *fresh, state = to_texts(sealer, session, self.uid)
        *texts, had = self.texts
        return *(texts if is_same else fresh), had if is_state_same else state


def new_record(
    sealer: Sealer,
    session: Session,
    *,
    number: int = 0,
    state_number: int | None,
    root_state: int | None,
    last_state: int,
) -> Record:
    """Return the first record of a session."""
    texts = to_texts(sealer, session, to_id_bytes(session.uid))
    return Record(session, state_number, root_state, last_state, number, new_stamp(), texts)


def new_stamp() -> int:
    """Return a number of 63 bits that no other write has."""
    return randbits(63)


def to_session_row(record: Record) -> tuple[Any, ...]:
    """Return the values of ``SESSION_COLUMNS``."""
    session, stored = record.session, record.texts[0]
    # Of a title that is sealed nothing else is kept.
    folded = stored.casefold() if isinstance(stored, str) else None
    title, params, metadata, template, state = map(to_raw_text, record.texts)
    names = session.app_name, session.user_id, session.window_id, session.agent_id
    return (
        *map(to_raw, session.key), to_id_bytes(session.uid), *map(to_raw, names), title,
        None if folded == stored else to_raw(folded), to_raw(session.provider), to_raw(session.model),
        params, metadata, template,
        session.ttl_s, session.archived, session.marked_idle, session.created_at, session.updated_at,
        session.last_accessed, session.expires_at, to_id(session.head), to_id(session.note), session.depth,
        session.rev, state, session.state_rev, record.state_number, record.root_state, record.last_state,
        record.seal,
    )  # fmt: skip


def from_record_row(sealer: Sealer, row: Row) -> Record:
    """Return the record in the values of ``RECORD_COLUMNS``.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        texts = tuple(map(from_raw_text, (row[7], *row[11:14], row[25])))
        record = Record(_read_session(sealer, row, texts), row[27], row[28], row[29], row[31], row[32], texts)
        is_whole = record.seal == row[30]
    except _BROKEN as error:
        raise SnapshotUnreadable(session_id=_shown_text(row[1])) from error
    if not is_whole:
        raise SnapshotUnreadable(session_id=record.session.key.session_id)
    return record


def _read_session(sealer: Sealer, row: Row, texts: tuple[Stored, ...]) -> Session:
    (
        owner, session_id, uid, app_name, user_id, window_id, agent_id, _, _, provider, model,
        _, _, _, ttl_s, archived, marked_idle, created_at, updated_at, last_accessed,
        expires_at, head, note, depth, rev, _, state_rev, *_,
    ) = row  # fmt: skip
    key = SessionKey(owner.decode(), session_id.decode())
    title, *objects = texts
    params, metadata, template, state = (
        from_text(sealer, key, uid, column, stored) for column, stored in zip(_OBJECTS, objects, strict=True)
    )
    return Session(
        key=key,
        uid=from_id_bytes(uid),
        app_name=app_name.decode(),
        agent_id=agent_id.decode(),
        created_at=created_at,
        updated_at=updated_at,
        last_accessed=last_accessed,
        expires_at=expires_at,
        user_id=_to_text(user_id),
        window_id=_to_text(window_id),
        title=from_title(sealer, key, uid, title),
        provider=_to_text(provider),
        model=_to_text(model),
        params=params or {},
        metadata=metadata or {},
        template=template,
        ttl_s=ttl_s,
        archived=archived,
        marked_idle=marked_idle,
        head=from_id(head),
        note=from_id(note),
        depth=depth,
        rev=rev,
        state=state or {},
        state_rev=state_rev,
    )


def to_turn_row(sealer: Sealer, uid: bytes, turn: Turn, body: bytes, state: int | None) -> tuple[Any, ...]:
    """Return the values of ``TURN_COLUMNS``; ``body`` is ``codec.to_turn_body(turn)``."""
    columns = (
        to_id_bytes(turn.turn_id), to_id(turn.parent), turn.depth, CODES[turn.status], turn.kept,
        turn.agent_id.encode(), turn.provider.encode(), turn.model.encode(), turn.boot_id.encode(),
        turn.started_at, turn.finished_at, state,
    )  # fmt: skip
    return (*columns, sealer.seal(body, _cover(uid, columns)))


def from_turn_row(sealer: Sealer, uid: bytes, row: Row, session_id: str, *, on_branch: bool = False) -> Turn:
    """Return the turn in the values of ``TURN_COLUMNS``.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        value = sealer.open(row[12], _cover(uid, row))
        columns = TurnColumns(
            turn_id=from_id_bytes(row[0]),
            parent=from_id(row[1]),
            depth=row[2],
            status=STATUSES[_status_of(row)],
            kept=row[4],
            agent_id=row[5].decode(),
            provider=row[6].decode(),
            model=row[7].decode(),
            boot_id=row[8].decode(),
            started_at=row[9],
            finished_at=row[10],
        )
        turn = from_turn_value(columns, value, on_branch=on_branch)
    except _BROKEN as error:
        raise SnapshotUnreadable(session_id=session_id, turn_id=_shown(row[0])) from error
    return rules.interrupted(turn, turn.started_at) if row[3] == ABANDONED else turn


def unreadable_turn(row: Row, *, on_branch: bool = False) -> Turn | None:
    """Return what a broken row shows of its turn, ``None`` if not even its id: a failed turn."""
    shown_id = _shown(row[0])
    if shown_id is None:
        return None
    error = SnapshotUnreadable()
    return Turn(
        turn_id=shown_id,
        parent=_shown(row[1]),
        depth=row[2],
        status=TurnStatus.FAILED,
        input="",
        agent_id="",
        provider="",
        model="",
        activation=Activation.RESTORED,
        started_at=row[9] if 0 <= row[9] <= LATEST_MS else 0,
        boot_id="",
        error=TurnError(error.code, error.detail),
        on_branch=on_branch,
    )


def show_turn(
    sealer: Sealer, uid: bytes, row: Row, session_id: str, *, on_branch: bool = False
) -> Turn | None:
    """Return the turn for a listing; a broken one as failed, so that its neighbours stay listed."""
    try:
        return from_turn_row(sealer, uid, row, session_id, on_branch=on_branch)
    except SnapshotUnreadable as error:
        _log.error("turn %s of session %r is unreadable", error.turn_id, error.session_id)
        return unreadable_turn(row, on_branch=on_branch)


def messages_of_row(sealer: Sealer, uid: bytes, row: Row, session_id: str) -> tuple[ContextMessage, ...]:
    """Return the messages in the values of ``TURN_COLUMNS``, without the turn around them.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        return messages_of(sealer.open(row[12], _cover(uid, row)))
    except _BROKEN as error:
        raise SnapshotUnreadable(session_id=session_id, turn_id=_shown(row[0])) from error


def open_turn_row(sealer: Sealer, uid: bytes, row: Row, session_id: str) -> bytes:
    """Return the body in the values of ``TURN_COLUMNS``, unread.

    Raises:
        SnapshotUnreadable: any of them has changed.
    """
    try:
        return sealer.open_body(row[12], _cover(uid, row))
    except _BROKEN as error:
        raise SnapshotUnreadable(session_id=session_id, turn_id=_shown(row[0])) from error


def to_row_of(sealer: Sealer, uid: bytes, row: Row, body: bytes) -> tuple[Any, ...]:
    """Return the row of the same turn for the session with this uid."""
    return (*row[:12], sealer.seal(body, _cover(uid, row)))


def is_committed(status: int, kept: bool) -> bool:
    """Say of two columns what ``Turn.is_committed`` says."""
    return status == CODES[TurnStatus.FINISHED] or (status == CODES[TurnStatus.CANCELLED] and kept)


def to_raw(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def to_raw_text(stored: Stored) -> bytes | None:
    """Return how a text of a session is stored: what is sealed begins with a byte that no UTF-8 has."""
    return _SEALED + stored if isinstance(stored, bytes) else to_raw(stored)


def from_raw_text(raw: bytes | None) -> Stored:
    """Return what ``to_raw_text`` was given."""
    return raw[1:] if raw is not None and raw[:1] == _SEALED else _to_text(raw)


def to_raw_id(text: str) -> bytes | None:
    """Return the stored form of what may be an id, ``None`` if it is none."""
    try:
        return to_id_bytes(text)
    except ValueError:
        return None


def marks(columns: str, first: int = 1) -> str:
    """Return a placeholder for each of ``columns``, numbered from ``first``."""
    return ", ".join(f"${number}" for number in range(first, first + len(columns.split(","))))


def _status_of(row: Row) -> int:
    return RUNNING if row[3] == ABANDONED else row[3]


def _cover(uid: bytes, row: Row) -> bytes:
    """Return what the seal of ``body`` vouches for beside it: whose it is, and every other column."""
    turn_id, parent, depth, _, kept, *names, started_at, finished_at, state = row[:12]
    numbers = _COVER.pack(
        uid, turn_id, _NO_ID if parent is None else parent, depth, _status_of(row), kept, started_at,
        -1 if finished_at is None else finished_at, 0 if state is None else state,
    )  # fmt: skip
    return numbers + b"\0".join(names)


def _to_text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode()


def _shown(raw: Any) -> str | None:
    return from_id_bytes(raw) if isinstance(raw, bytes) and len(raw) == 16 else None


def _shown_text(raw: Any) -> str:
    return raw.decode(errors="replace") if isinstance(raw, bytes) else ""
