"""The default store: one SQLite file, one writing thread, two reading ones.

No call waits for the disk on the event loop's thread. Writes go to the
``Writer``, which commits what waits together; reads go to an executor whose two
threads share two connections. A ``SqliteStore`` is opened and closed on the event
loop that uses it. No call waits for ever either: a read that takes too long has
failed, a write that does has an unknown outcome, since the thread may yet do it.

What would end with a write that must fail is refused before it begins: a turn or a
new session while the disk is full, refuses writes, or does not answer.
"""

import asyncio
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from app.domain.branch import HeadTarget
from app.domain.checkpoint import AutoCheckpoint, Checkpoint, CheckpointPage
from app.domain.compaction import Note
from app.domain.erasure import Erased
from app.domain.errors import SessionExists, SessionLimit, StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.journal import Entry, Position
from app.domain.session import LifeSpan, Path, Session, SessionCap, SessionChange, SessionPage, SessionQuery
from app.domain.state import SharedState, StateScope
from app.domain.stats import SessionStats, UserUsage
from app.domain.turn import BoundTurn, JsonObject, Turn, TurnPage, Usage
from app.stores import rules
from app.stores.codec import to_turn_body
from app.stores.sealing import Sealer
from app.stores.sqlite import branches, checkpoints, file, journal, notes, reads, states, stats, sweep, writes
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.keeper import Files
from app.stores.sqlite.moving import SqliteMoving
from app.stores.sqlite.starts import Starts
from app.stores.sqlite.unit import Unit
from app.stores.sqlite.users import SqliteUsers
from app.stores.sqlite.writer import Writer

if TYPE_CHECKING:
    from app.stores.keyring import KeyRing

READ_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 10.0
ROOM_CHECK_S = 1.0

P = ParamSpec("P")
T = TypeVar("T")


class SqliteStore(SqliteMoving, SqliteUsers):
    """Sessions in the file ``path``; ``<path>.lock`` keeps every other process away.

    With ``wait_for_lock`` ``open`` waits until the other process is gone. With ``keys`` what
    people and models said is encrypted. A store that was closed may be opened again.
    """

    def __init__(
        self, path: str, life: LifeSpan, *, wait_for_lock: bool = False, keys: "KeyRing | None" = None
    ) -> None:
        self._path = path
        self._life = life
        self._sealer = Sealer(keys)
        self._wait_for_lock = wait_for_lock
        self._files: Files | None = None
        self._writer: Writer | None = None
        self._starts: Starts | None = None
        self._has_room = True
        self._look_again_at = -inf

    async def open(self, boot_id: str, node_url: str | None = None) -> None:
        """Open, migrate and recover. Cancelled while it waits for the lock, it gives up.

        Raises:
            StoreLocked: another process has it.
            StoreUnavailable: the file cannot be used; the message says why.
        """
        # "while": several calls may have waited for the same end.
        while self._writer is not None and self._writer.is_stopping:
            ending = self._writer
            await asyncio.shield(ending.closed)
            if self._writer is ending:
                self._writer = None
        if self._writer is None:
            waits = self._wait_for_lock
            self._files = Files(self._path, boot_id, self._life, self._sealer, wait_for_lock=waits)
            self._writer = Writer(self._files)
            self._starts = Starts(self._writer)
            self._writer.start()
        writer = self._writer
        try:
            await asyncio.shield(writer.opened)
        except BaseException:
            writer.stop()
            raise

    async def close(self) -> None:
        """Finish every accepted write, then close. Cancelling it does not stop the closing."""
        if self._writer is not None and self._starts is not None:
            self._starts.close()
            self._writer.stop()
            await asyncio.shield(self._writer.closed)

    async def ping(self) -> None:
        """Return when everything that was queued before has been written."""
        self._get_starts().hand_over_all()
        await self._write("ping", writes.ping)

    def session_count_nowait(self) -> int | None:
        unit = self._writer.unit if self._writer else None
        return None if unit is None else unit.totals["sessions"]

    @property
    def transactions(self) -> int:
        """How many transactions were committed since the store was opened."""
        return self._writer.transactions if self._writer else 0

    async def create_session(self, session: Session) -> None:
        self._check_room()
        await self._write("create_session", writes.create_session, session)

    async def ensure_session(self, session: Session) -> Session:
        await self._get_starts().wait_written(session.key)
        known = self._get_writer().records.find(session.key)
        if known is not None:
            return known
        self._check_room()
        return await self._write("ensure_session", writes.ensure_session, session)

    async def create_sessions(
        self, sessions: Sequence[Session], cap: SessionCap | None = None
    ) -> tuple[SessionExists | SessionLimit | None, ...]:
        self._check_room()
        self._hand_over_victims(cap)
        return await self._write("create_sessions", writes.create_sessions, sessions, cap)

    async def list_oldest(self, owner: str, user_id: str, limit: int) -> tuple[Session, ...]:
        await self._get_starts().wait_all_written()
        return await self._read(reads.list_oldest, owner, user_id, limit)

    async def find_session(self, key: SessionKey) -> Session | None:
        await self._get_starts().wait_written(key)
        known = self._get_writer().records.find(key)
        return await self._read(reads.find_session, key) if known is None else known

    async def list_sessions(self, query: SessionQuery) -> SessionPage:
        await self._get_starts().wait_all_written()
        return await self._read(reads.list_sessions, query, self._life)

    async def update_session(
        self, key: SessionKey, change: SessionChange, now: int, *, expected_etag: str | None = None
    ) -> Session:
        work = writes.update_session
        return await self._change(key, "update_session", work, key, change, now, expected_etag)

    async def patch_state(
        self, key: SessionKey, patch: JsonObject, now: int, *, expected_rev: int | None = None
    ) -> Session:
        work = states.patch_state
        return await self._change(key, "patch_state", work, key, patch, now, expected_rev)

    async def get_shared(self, scope: StateScope) -> SharedState:
        return await self._read(states.get_shared, scope)

    async def patch_shared(
        self, scope: StateScope, patch: JsonObject, now: int, *, expected_rev: int | None = None
    ) -> SharedState:
        return await self._write("patch_shared", states.patch_shared, scope, patch, now, expected_rev)

    async def touch_session(self, key: SessionKey, now: int) -> Session:
        return await self._change(key, "touch_session", writes.touch_session, key, now)

    async def delete_session(self, key: SessionKey) -> bool:
        return await self._change(key, "delete_session", writes.delete_session, key)

    async def delete_sessions(self, keys: Sequence[SessionKey]) -> Erased:
        for key in keys:
            self._get_starts().hand_over(key)
        return await self._write("delete_sessions", writes.delete_sessions, keys)

    async def list_keys(
        self, owner: str | None, *, user_id: str | None = None, agent_id: str | None = None, limit: int
    ) -> tuple[SessionKey, ...]:
        return await self._read(reads.list_keys, owner, user_id, agent_id, limit)

    async def load_path(self, session: Session) -> Path:
        if session.head is None:
            known = self._get_writer().records.find(session.key)
            if known is not None and known.uid == session.uid:
                return Path(None, None, (), 0)
        return await self._read(reads.load_path, session)

    async def at_turn(self, session: Session, turn_id: str | None) -> Session:
        return await self._read(branches.at_turn, session, turn_id)

    async def move_head(self, session: Session, target: HeadTarget, now: int) -> Session:
        work = branches.move_head
        return await self._change(session.key, "move_head", work, session, target, now)

    async def fork_session(
        self, origin: Session, target: HeadTarget | None, new: Session, cap: SessionCap | None = None
    ) -> Session:
        self._check_room()
        self._hand_over_victims(cap)
        return await self._write("fork_session", branches.fork_session, origin, target, new, cap)

    async def add_checkpoint(self, session: Session, checkpoint: Checkpoint) -> Checkpoint:
        work = checkpoints.add_checkpoint
        return await self._change(session.key, "add_checkpoint", work, session, checkpoint)

    async def list_checkpoints(
        self, session: Session, limit: int, cursor: str | None = None
    ) -> CheckpointPage:
        return await self._read(checkpoints.list_checkpoints, session, limit, cursor)

    async def get_checkpoint(self, session: Session, checkpoint_id: str) -> Checkpoint:
        return await self._read(checkpoints.get_checkpoint, session, checkpoint_id)

    async def delete_checkpoints(self, session: Session, checkpoint_id: str | None = None) -> int:
        return await self._write("delete_checkpoints", checkpoints.delete_checkpoints, session, checkpoint_id)

    async def add_note(self, session: Session, note: Note, usage: Usage) -> Session:
        return await self._change(session.key, "add_note", notes.add_note, session, note, usage)

    async def get_note(self, session: Session) -> Note | None:
        return await self._read(notes.get_note, session)

    async def list_notes(self, session: Session) -> tuple[Note, ...]:
        return await self._read(notes.list_notes, session)

    async def list_entries(
        self, session: Session, position: Position | None, limit: int, *, newest_first: bool
    ) -> tuple[Entry, ...]:
        names = self._get_files().names
        await self._get_starts().wait_written(session.key)
        return await self._read(
            journal.list_entries, names, session, position, limit, newest_first=newest_first
        )

    async def start_turn(self, session: Session, turn: Turn) -> None:
        """Let the start record wait and return; a failure to write it is logged, not raised.

        Raises:
            StoreUnavailable: the turn's commit could not be written, so it must not begin.
        """
        self._check_room()
        self._get_starts().defer(session, turn)

    async def commit_turn(
        self,
        session: Session,
        turn: Turn,
        *,
        resets_state: bool = False,
        checkpoint: AutoCheckpoint | None = None,
    ) -> Session:
        rules.check_committed(turn)
        work = writes.commit_turn
        return await self._land(session, turn, "commit_turn", work, resets_state, checkpoint)

    async def record_turn(self, session: Session, turn: Turn) -> None:
        rules.check_dropped(turn)
        await self._land(session, turn, "record_turn", writes.record_turn)

    async def find_bound(self, owner: str, key: str) -> BoundTurn | None:
        return await self._read(reads.find_bound, self._get_files().names, owner, key)

    async def get_turn(self, session: Session, turn_id: str) -> Turn:
        await self._get_starts().wait_written(session.key)
        return await self._read(reads.get_turn, self._get_files().names, session, turn_id)

    async def list_turns(self, session: Session, limit: int, cursor: str | None = None) -> TurnPage:
        await self._get_starts().wait_written(session.key)
        return await self._read(reads.list_turns, self._get_files().names, session, limit, cursor)

    async def list_branch(self, session: Session, limit: int, before: str | None = None) -> tuple[Turn, ...]:
        return await self._read(reads.list_branch, self._get_files().names, session, limit, before)

    async def get_usage(self, owner: str, user_id: str, limit: int) -> UserUsage:
        return await self._read(reads.get_usage, owner, user_id, limit)

    async def get_session_stats(self) -> SessionStats:
        await self._get_starts().wait_all_written()
        return await self._read(stats.get_session_stats)

    async def expire_and_purge(self, now: int, limit: int) -> tuple[int, int]:
        """Do it in steps, so that other writes get their turn between them."""
        boot_id, expired, purged = self._get_files().boot_id, 0, 0
        starts = self._get_starts()
        while True:
            starts.hand_over_all()
            step = await self._write("sweep", sweep.sweep, now)
            expired += step.done
            if step.is_last:
                break
        while purged < limit:
            starts.hand_over_all()
            step = await self._write("purge", sweep.purge, now, limit - purged, boot_id)
            purged += step.done
            if step.is_last:
                break
        return expired, purged

    async def _change(
        self,
        key: SessionKey,
        label: str,
        work: Callable[Concatenate[Unit, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """As ``_write``, for work that concerns a session of which a turn may have started."""
        self._get_starts().hand_over(key)
        return await self._write(label, work, *args, **kwargs)

    async def _land(
        self,
        session: Session,
        turn: Turn,
        label: str,
        work: Callable[Concatenate[Unit, Session, Turn, bytes, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """As ``_write``, for the end of ``turn``; once it is stored, its start record need not be."""
        starts = self._get_starts()
        starts.hand_over(session.key, unless=turn.turn_id)
        result = await self._write(label, work, session, turn, to_turn_body(turn), *args, **kwargs)
        starts.drop(session.key, turn.turn_id)
        return result

    def _hand_over_victims(self, cap: SessionCap | None) -> None:
        for victim in cap.victims if cap is not None else ():
            self._get_starts().hand_over(victim.key)

    async def _write(
        self, label: str, work: Callable[Concatenate[Unit, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Have ``work`` done by the writer. A caller that is cancelled does not undo it."""
        writer = self._get_writer()

        def bound(unit: Unit) -> T:
            return work(unit, *args, **kwargs)

        done = writer.submit(bound, label)
        # Not asyncio.timeout, which would take 7 µs instead of 1.
        patience = asyncio.get_running_loop().call_later(WRITE_TIMEOUT_S, writer.give_up_on, done)
        try:
            return await done
        finally:
            patience.cancel()

    async def _read(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        files = self._get_files()

        def bound(connection: Connection) -> T:
            return work(connection, *args, **kwargs)

        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(files.executor, files.read, bound)
        except TimeoutError as error:
            raise StoreUnavailable("The database takes too long to read.") from error

    def _check_room(self) -> None:
        """Refuse what the disk would not take.

        Raises:
            StoreUnavailable
        """
        writer = self._get_writer()
        now = asyncio.get_running_loop().time()
        if now >= self._look_again_at:
            self._has_room = file.has_room(self._get_files().directory)
            self._look_again_at = now + ROOM_CHECK_S
        if not self._has_room:
            raise StoreUnavailable("The disk is full.")
        if writer.trouble is not None:
            raise StoreUnavailable("The disk refuses writes.") from writer.trouble
        if writer.is_stuck:
            raise StoreUnavailable("The database does not finish its writes.")

    def _get_writer(self) -> Writer:
        if self._writer is None or not self._writer.is_open:
            raise StoreUnavailable("The store is not open.")
        return self._writer

    def _get_starts(self) -> Starts:
        self._get_writer()
        assert self._starts is not None
        return self._starts

    def _get_files(self) -> Files:
        self._get_writer()
        assert self._files is not None
        return self._files
