"""Rows of the SQLite schema <-> domain values, each checked against its seal."""

import logging
import struct
from typing import Any, NamedTuple
from zlib import crc32

from app.domain.errors import SnapshotUnreadable
from app.domain.ids import SessionKey, from_id_bytes, to_id_bytes
from app.domain.session import Session
from app.domain.turn import Activation, ContextMessage, Turn, TurnError, TurnStatus
from app.stores.codec import (
    TurnColumns,
    from_turn_value,
    messages_of,
    session_seal,
)
from app.stores.sealing import Sealer
from app.stores.session_texts import Stored, from_text, from_title, to_texts
from app.stores.side_rows import Row, from_id, to_id
from app.stores.sqlite.connection import Connection

SESSION_COLUMNS = (
    "owner, session_id, uid, app_name, user_id, window_id, agent_id, title, title_folded, provider, model,"
    " params, metadata, template, ttl_s, archived, marked_idle, created_at, updated_at, last_accessed,"
    " expires_at, head, note, depth, rev, state, state_rev, state_number, root_state, seal"
)
ACTIVITY_COLUMNS = (
    "head, note, depth, updated_at, last_accessed, expires_at, marked_idle, state_number, phase, seal"
)
TURN_COLUMNS = (
    "turn_id, parent, depth, status, kept, agent, provider, model, boot, started_at, finished_at, state, body"
)

LATEST_MS = 253_402_300_799_999
"""The end of the year 9999; a time behind it is no time."""

RUNNING = 0
STATUSES = (TurnStatus.RUNNING, TurnStatus.FINISHED, TurnStatus.FAILED, TurnStatus.CANCELLED)
CODES = {status: code for code, status in enumerate(STATUSES)}

_COVER = struct.Struct(">16s16s16sqBBqqqqqqq")
_NO_ID = bytes(16)


_log = logging.getLogger(__name__)


class TurnNames(NamedTuple):
    """The numbers of a turn's interned strings."""

    agent: int
    provider: int
    model: int
    boot: int


class Home(NamedTuple):
    """The session that a turn is written to; ``has_user``: what it takes is counted for somebody."""

    number: int
    uid: bytes
    has_user: bool


class Record(NamedTuple):
    """A session as the file has it: what the domain knows of it, and what only the store does.

    ``state_number`` is the number under which its state is kept, ``None`` if it is not kept
    yet or empty; ``root_state`` that of the state it was created with, ``None`` if that was empty.
    """

    session: Session
    state_number: int | None
    root_state: int | None
    phase: int
    number: int
    row: Row

    @property
    def uid(self) -> bytes:
        uid: bytes = self.row[2]
        return uid

    @property
    def home(self) -> Home:
        return Home(self.number, self.uid, self.session.user_id is not None)


class Whose(NamedTuple):
    """Whose turns are read, and what opens them."""

    sealer: Sealer
    uid: bytes
    session_id: str


class Names:
    """The interned strings by number, remembered: a stored one never changes."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}

    def get_text(self, connection: Connection, number: int) -> str:
        """Return the string.

        Raises:
            SnapshotUnreadable: it is missing or broken.
        """
        text = self._texts.get(number)
        if text is None:
            row = connection.execute("SELECT text, seal FROM names WHERE id = ?", (number,)).fetchone()
            if row is None or not isinstance(row[0], str) or row[1] != crc32(row[0].encode()):
                raise SnapshotUnreadable
            text = self._texts[number] = row[0]
        return text


def whose(connection: Connection, session: Session) -> Whose:
    return Whose(connection.sealer, to_id_bytes(session.uid), session.key.session_id)


def to_session_row(
    sealer: Sealer, session: Session, state_number: int | None, root_state: int | None
) -> tuple[Any, ...]:
    """Return the values of ``SESSION_COLUMNS``."""
    uid = to_id_bytes(session.uid)
    # What is encrypted is searched by opening it.
    folded = None if sealer.encrypts else session.title and session.title.casefold()
    title, params, metadata, template, state = texts = to_texts(sealer, session, uid)
    numbers = state_number, root_state
    return (
        *session.key, uid, session.app_name, session.user_id, session.window_id,
        session.agent_id, title, None if folded == session.title else folded, session.provider,
        session.model, params, metadata, template, session.ttl_s, session.archived, session.marked_idle,
        session.created_at, session.updated_at, session.last_accessed, session.expires_at,
        to_id(session.head), to_id(session.note), session.depth, session.rev, state, session.state_rev,
        *numbers, session_seal(session, texts, numbers),
    )  # fmt: skip


def to_activity_row(
    session: Session, record: Record, state_number: int | None, phase: int
) -> tuple[Any, ...]:
    """Return the values of ``ACTIVITY_COLUMNS`` for ``session``, which was ``record`` before.

    Its texts have not changed.
    """
    return (
        to_id(session.head), to_id(session.note), session.depth, session.updated_at, session.last_accessed,
        session.expires_at, session.marked_idle, state_number, phase,
        session_seal(session, texts_of(record.row), (state_number, record.root_state)),
    )  # fmt: skip


def texts_of(row: Row) -> tuple[Stored, ...]:
    """Return those of the values of ``SESSION_COLUMNS`` that people wrote, as they are stored."""
    return row[7], row[11], row[12], row[13], row[25]


def from_session_row(sealer: Sealer, row: Row) -> Session:
    """Return the session in the values of ``SESSION_COLUMNS``.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        session = _read_session(sealer, row)
        sealed = session_seal(session, texts_of(row), row[27:29])
    except (TypeError, ValueError, AttributeError, SnapshotUnreadable) as error:
        raise SnapshotUnreadable(session_id=str(row[1])) from error
    if sealed != row[29]:
        raise SnapshotUnreadable(session_id=session.key.session_id)
    return session


def from_record_row(sealer: Sealer, row: Row) -> Record:
    """Return the record in the values of ``SESSION_COLUMNS``, its phase and its number.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    return Record(from_session_row(sealer, row), row[27], row[28], row[30], row[31], row)


def _read_session(sealer: Sealer, row: Row) -> Session:
    (
        owner, session_id, uid, app_name, user_id, window_id, agent_id, title, _, provider, model,
        params, metadata, template, ttl_s, archived, marked_idle, created_at, updated_at, last_accessed,
        expires_at, head, note, depth, rev, state, state_rev, *_,
    ) = row  # fmt: skip
    key = SessionKey(owner, session_id)
    return Session(
        key=key,
        uid=from_id_bytes(uid),
        app_name=app_name,
        agent_id=agent_id,
        created_at=created_at,
        updated_at=updated_at,
        last_accessed=last_accessed,
        expires_at=expires_at,
        user_id=user_id,
        window_id=window_id,
        title=from_title(sealer, key, uid, title),
        provider=provider,
        model=model,
        params=from_text(sealer, key, uid, "params", params) if params else {},
        metadata=from_text(sealer, key, uid, "metadata", metadata) if metadata else {},
        template=from_text(sealer, key, uid, "template", template),
        ttl_s=ttl_s,
        archived=bool(archived),
        marked_idle=bool(marked_idle),
        head=from_id(head),
        note=from_id(note),
        depth=depth,
        rev=rev,
        state=from_text(sealer, key, uid, "state", state) if state else {},
        state_rev=state_rev,
    )


def json_chars(row: Row) -> int:
    """Return how much JSON the values of ``SESSION_COLUMNS`` hold."""
    return sum(len(text) for text in texts_of(row)[1:] if text)


def to_turn_row(
    sealer: Sealer, uid: bytes, turn: Turn, body: bytes, names: TurnNames, state: int | None
) -> tuple[Any, ...]:
    """Return the values of ``TURN_COLUMNS`` of a turn of the session ``uid``.

    ``body`` is ``codec.to_turn_body(turn)``.
    """
    columns = (
        to_id_bytes(turn.turn_id), to_id(turn.parent), turn.depth, CODES[turn.status], int(turn.kept),
        *names, turn.started_at, turn.finished_at, state,
    )  # fmt: skip
    return (*columns, sealer.seal(body, _cover(uid, columns)))


def to_turn_row_of(whose: Whose, uid: bytes, row: Row) -> tuple[Any, ...]:
    """Return the values of ``TURN_COLUMNS`` for the session ``uid``, too.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    body = open_turn_row(row, whose)
    return (*row[:12], whose.sealer.seal(body, _cover(uid, row)))


def from_turn_row(
    row: Row, connection: Connection, names: Names, whose: Whose, *, on_branch: bool = False
) -> Turn:
    """Return the turn in the values of ``TURN_COLUMNS``.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        value = whose.sealer.open(row[12], _cover(whose.uid, row))
        columns = TurnColumns(
            turn_id=from_id_bytes(row[0]),
            parent=from_id(row[1]),
            depth=row[2],
            status=STATUSES[row[3]],
            kept=bool(row[4]),
            agent_id=names.get_text(connection, row[5]),
            provider=names.get_text(connection, row[6]),
            model=names.get_text(connection, row[7]),
            boot_id=names.get_text(connection, row[8]),
            started_at=row[9],
            finished_at=row[10],
        )
        return from_turn_value(columns, value, on_branch=on_branch)
    except (SnapshotUnreadable, struct.error, TypeError, ValueError, IndexError) as error:
        raise SnapshotUnreadable(session_id=whose.session_id, turn_id=_shown(row[0])) from error


def unreadable_turn(row: Row, *, on_branch: bool = False) -> Turn | None:
    """Return what a broken row shows of its turn, ``None`` if not even its id: a failed turn.

    Its columns are believed as far as they have a sensible type.
    """
    turn_id, parent, depth, started_at = row[0], row[1], row[2], row[9]
    shown_id = _shown(turn_id)
    if shown_id is None:
        return None
    error = SnapshotUnreadable()
    return Turn(
        turn_id=shown_id,
        parent=_shown(parent),
        depth=depth if isinstance(depth, int) else 0,
        status=TurnStatus.FAILED,
        input="",
        agent_id="",
        provider="",
        model="",
        activation=Activation.RESTORED,
        started_at=started_at if isinstance(started_at, int) and 0 <= started_at <= LATEST_MS else 0,
        boot_id="",
        error=TurnError(error.code, error.detail),
        on_branch=on_branch,
    )


def show_turn(
    row: Row, connection: Connection, names: Names, whose: Whose, *, on_branch: bool = False
) -> Turn | None:
    """Return the turn for a listing; a broken one as failed, so that its neighbours stay listed."""
    try:
        return from_turn_row(row, connection, names, whose, on_branch=on_branch)
    except SnapshotUnreadable as error:
        _log.error("turn %s of session %r is unreadable", error.turn_id, error.session_id)
        return unreadable_turn(row, on_branch=on_branch)


def messages_of_row(row: Row, whose: Whose) -> tuple[ContextMessage, ...]:
    """Return the messages in the values of ``TURN_COLUMNS``, without the turn around them.

    Raises:
        SnapshotUnreadable: the row is broken.
    """
    try:
        return messages_of(whose.sealer.open(row[12], _cover(whose.uid, row)))
    except (SnapshotUnreadable, struct.error, TypeError) as error:
        raise SnapshotUnreadable(session_id=whose.session_id, turn_id=_shown(row[0])) from error


def open_turn_row(row: Row, whose: Whose) -> bytes:
    """Return the body in the values of ``TURN_COLUMNS``, none of which has changed.

    Raises:
        SnapshotUnreadable: one has, or the key of the body is missing.
    """
    try:
        return whose.sealer.open_body(row[12], _cover(whose.uid, row))
    except (SnapshotUnreadable, struct.error, TypeError) as error:
        raise SnapshotUnreadable(session_id=whose.session_id, turn_id=_shown(row[0])) from error


def is_committed(status: int, kept: int) -> bool:
    """Say of two columns what ``Turn.is_committed`` says."""
    return STATUSES[status] is TurnStatus.FINISHED or (
        STATUSES[status] is TurnStatus.CANCELLED and bool(kept)
    )


def _cover(uid: bytes, row: Row) -> bytes:
    """Return what ``body`` is sealed with: whose it is, and every other column of the turn."""
    turn_id, parent, *others, finished_at, state = row[:12]
    return _COVER.pack(
        uid, turn_id, _NO_ID if parent is None else parent, *others,
        -1 if finished_at is None else finished_at, 0 if state is None else state,
    )  # fmt: skip


def _shown(raw: Any) -> str | None:
    return from_id_bytes(raw) if isinstance(raw, bytes) and len(raw) == 16 else None
