"""The PostgreSQL store: what each call of the port does, and in how many statements."""

import logging
from collections.abc import Sequence

import asyncpg

from app.domain.branch import HeadTarget
from app.domain.checkpoint import AutoCheckpoint, Checkpoint, CheckpointPage
from app.domain.compaction import Note
from app.domain.dump import RestDump, SessionDump
from app.domain.erasure import Erased
from app.domain.errors import (
    AgentPoolError,
    SessionExists,
    SessionLimit,
    SnapshotUnreadable,
    StoreUnavailable,
)
from app.domain.ids import SessionKey
from app.domain.journal import Entry, Position
from app.domain.lease import LEASE_S, Node
from app.domain.session import LifeSpan, Path, Session, SessionCap, SessionChange, SessionPage, SessionQuery
from app.domain.state import SharedState, StateScope
from app.domain.stats import SessionStats, UserUsage
from app.domain.turn import BoundTurn, JsonObject, Turn, TurnPage, Usage
from app.ports.moving import Resealed
from app.stores import rules
from app.stores.codec import to_turn_body
from app.stores.ensuring import EnsuresInTwoSteps
from app.stores.postgres import (
    boot,
    branches,
    checkpoints,
    journal,
    listing,
    moving,
    notes,
    reads,
    records,
    states,
    tree,
    turns,
    users,
)
from app.stores.postgres.calls import Calls
from app.stores.postgres.leases import PostgresLeases
from app.stores.postgres.link import Connection, Link
from app.stores.postgres.refusal import TookTooLong
from app.stores.postgres.rows import Record
from app.stores.postgres.turns import Ended, Started, Taker
from app.stores.postgres.unit import View, is_same
from app.stores.sealing import Keys, Sealer

_TRIES = 4

_log = logging.getLogger(__name__)


class PostgresStore(Calls, EnsuresInTwoSteps):
    """Sessions in the schema that the connection's ``search_path`` names first; others may share it.

    ``target`` is a URL, or a pool that ``close`` leaves open (its connections should reset nothing
    and have time limits; calls have theirs in any case). ``accept_volatile`` lets it open a server
    that does not promise to keep what it acknowledged. With ``keys`` all content is encrypted.
    """

    def __init__(
        self,
        target: "str | asyncpg.Pool",
        life: LifeSpan,
        *,
        lease_s: float = LEASE_S,
        accept_volatile: bool = False,
        keys: Keys | None = None,
    ) -> None:
        super().__init__(Link(target), life, Sealer(keys))
        self._accept_volatile = accept_volatile
        self._leases = PostgresLeases(self._link, lease_s)

    @property
    def leases(self) -> PostgresLeases:
        return self._leases

    async def open(self, boot_id: str, node_url: str | None = None) -> None:
        """Migrate if need be, one process after the other; end the turns whose leases have run out.

        Raises:
            StoreUnavailable: the database cannot be used; the message says why.
        """
        if self._link.is_open:
            return
        self._leases.node = node = Node(boot_id, node_url)
        await self._link.open()
        try:
            await boot.open_database(
                self._link, self._life, node, self._leases.duration_s, self._accept_volatile
            )
            self._count = await self._read(_count)
        except BaseException:
            await self._link.close()
            raise

    async def close(self) -> None:
        """Finish what was begun, let this process's leases run out, close the connections."""
        if self._link.is_open:
            self._leases.close()
            try:
                await self._link.close(boot.leaving(self._leases.node))
            except StoreUnavailable as error:
                _log.warning("the leases of this process stay until they run out: %s", error.detail)

    async def ping(self) -> None:
        """Return when the database has answered, and all writes that were under way."""
        writes = self._link.wait_written()
        await self._read(_ping)
        await writes

    def session_count_nowait(self) -> int | None:
        """Return how many there were when this process last counted, and what it has changed since."""
        return self._count

    async def create_session(self, session: Session) -> None:
        await self._write(records.create_session, session)

    async def create_sessions(
        self, sessions: Sequence[Session], cap: SessionCap | None = None
    ) -> tuple[SessionExists | SessionLimit | None, ...]:
        return await self._write(records.create_sessions, sessions, cap)

    async def list_oldest(self, owner: str, user_id: str, limit: int) -> tuple[Session, ...]:
        return await self._read(listing.list_oldest, owner, user_id, limit)

    async def find_session(self, key: SessionKey) -> Session | None:
        record = await self._read(tree.find_by_key, key)
        if record is None:
            self._records.drop(key)
            return None
        self._records.keep(record)
        return record.session

    def recall_session(self, key: SessionKey) -> Session | None:
        record = self._records.find(key)
        return None if record is None else record.session

    async def list_sessions(self, query: SessionQuery) -> SessionPage:
        return await self._look(listing.list_sessions, query, self._life)

    async def update_session(
        self, key: SessionKey, change: SessionChange, now: int, *, expected_etag: str | None = None
    ) -> Session:
        return await self._write(records.update_session, key, change, now, expected_etag)

    async def patch_state(
        self, key: SessionKey, patch: JsonObject, now: int, *, expected_rev: int | None = None
    ) -> Session:
        return await self._write(states.patch_state, key, patch, now, expected_rev)

    async def get_shared(self, scope: StateScope) -> SharedState:
        return await self._read(states.get_shared, scope)

    async def patch_shared(
        self, scope: StateScope, patch: JsonObject, now: int, *, expected_rev: int | None = None
    ) -> SharedState:
        return await self._link.run(
            lambda connection: states.patch_shared(self._view(connection), scope, patch, now, expected_rev),
            writes=True,
            repeats=False,
        )

    async def touch_session(self, key: SessionKey, now: int) -> Session:
        return await self._write(records.touch_session, key, now)

    async def delete_session(self, key: SessionKey) -> bool:
        return await self._remove(records.delete_session, key)

    async def delete_sessions(self, keys: Sequence[SessionKey]) -> Erased:
        return await self._remove(records.delete_sessions, keys)

    async def list_keys(
        self, owner: str | None, *, user_id: str | None = None, agent_id: str | None = None, limit: int
    ) -> tuple[SessionKey, ...]:
        return await self._read(listing.list_keys, owner, user_id, agent_id, limit)

    async def load_path(self, session: Session) -> Path:
        return await self._look(reads.load_path, session)

    async def at_turn(self, session: Session, turn_id: str | None) -> Session:
        return await self._look(branches.at_turn, session, turn_id)

    async def move_head(self, session: Session, target: HeadTarget, now: int) -> Session:
        return await self._write(branches.move_head, session, target, now)

    async def fork_session(
        self, origin: Session, target: HeadTarget | None, new: Session, cap: SessionCap | None = None
    ) -> Session:
        return await self._write(branches.fork_session, origin, target, new, cap)

    async def add_checkpoint(self, session: Session, checkpoint: Checkpoint) -> Checkpoint:
        return await self._write(checkpoints.add_checkpoint, session, checkpoint)

    async def list_checkpoints(
        self, session: Session, limit: int, cursor: str | None = None
    ) -> CheckpointPage:
        return await self._look(checkpoints.list_checkpoints, session, limit, cursor)

    async def get_checkpoint(self, session: Session, checkpoint_id: str) -> Checkpoint:
        return await self._look(checkpoints.get_checkpoint, session, checkpoint_id)

    async def delete_checkpoints(self, session: Session, checkpoint_id: str | None = None) -> int:
        return await self._write(checkpoints.delete_checkpoints, session, checkpoint_id)

    async def add_note(self, session: Session, note: Note, usage: Usage) -> Session:
        return await self._write(notes.add_note, session, note, usage)

    async def get_note(self, session: Session) -> Note | None:
        return await self._look(notes.get_note, session)

    async def list_notes(self, session: Session) -> tuple[Note, ...]:
        return await self._look(notes.list_all, session)

    async def list_entries(
        self, session: Session, position: Position | None, limit: int, *, newest_first: bool
    ) -> tuple[Entry, ...]:
        return await self._look(journal.list_entries, session, position, limit, newest_first)

    async def start_turn(self, session: Session, turn: Turn) -> Session | None:
        """As the port says, in one statement where this process has seen the session last.

        Where only what no turn depends on has changed, like the last activity, it takes a second one.
        Cancelled, or where the second one fails, it leaves neither lease nor record.
        """
        body, record = to_turn_body(turn), self._records.find_for(session)
        taker = Taker(self._leases.node, self._leases.duration_s)
        undo = self._leases.giving_back(session.key, turn.turn_id)
        is_taken = False
        try:
            for _ in range(_TRIES):
                known = record

                async def work(connection: Connection) -> tuple[Started, Record | None]:
                    view = self._view(connection)
                    return await turns.start_turn(view, known, session, turn, body, taker, self._life)  # noqa: B023

                outcome, record = await self._link.run(work, writes=True, undo=undo)
                if record is not None:
                    self._records.keep(record)
                if outcome is not Started.OTHER_RECORD:
                    return None
                if record is not None and not is_same(record.session, session):
                    return record.session
                is_taken = True
            raise StoreUnavailable("The session changes all the time.")
        except AgentPoolError as error:
            if is_taken or isinstance(error, SnapshotUnreadable):  # which is read after it was taken
                await self._leases.give_back_after(error, session.key, turn.turn_id)
            raise

    async def commit_turn(
        self,
        session: Session,
        turn: Turn,
        *,
        resets_state: bool = False,
        checkpoint: AutoCheckpoint | None = None,
    ) -> Session:
        """As the port says, in one statement where the turn goes on from the head that was seen last."""
        rules.check_committed(turn)
        body, record = to_turn_body(turn), self._records.find(session.key)
        is_usual = record is not None and not resets_state and checkpoint is None
        end = (
            turns.plan_commit(self._sealer, record, session, turn, self._life)
            if record and is_usual
            else None
        )
        if end is not None:
            outcome = await self._send_end(session, turn, body, end)
            turns.check_ended(outcome, session, turn)
            if outcome in (Ended.DONE, Ended.WITHOUT_KEY):
                self._records.keep(end.record)
                return end.record.session
        return await self._repeat(turns.commit_turn, session, turn, body, resets_state, checkpoint)

    async def record_turn(self, session: Session, turn: Turn) -> None:
        rules.check_dropped(turn)
        body, record = to_turn_body(turn), self._records.find(session.key)
        if record is not None and record.session.uid == session.uid:
            end = turns.plan_record(self._sealer, record, turn, self._life)
            outcome = await self._send_end(session, turn, body, end)
            if outcome is Ended.DONE:
                self._records.keep(end.record)
            if outcome is not Ended.OTHER_RECORD:
                return
        await self._repeat(turns.record_turn, session, turn, body)

    async def find_bound(self, owner: str, key: str) -> BoundTurn | None:
        return await self._look(reads.find_bound, owner, key)

    async def get_turn(self, session: Session, turn_id: str) -> Turn:
        return await self._look(reads.get_turn, session, turn_id)

    async def list_turns(self, session: Session, limit: int, cursor: str | None = None) -> TurnPage:
        return await self._look(reads.list_turns, session, limit, cursor)

    async def list_branch(self, session: Session, limit: int, before: str | None = None) -> tuple[Turn, ...]:
        return await self._look(reads.list_branch, session, limit, before)

    async def get_usage(self, owner: str, user_id: str, limit: int) -> UserUsage:
        return await self._look(listing.get_usage, owner, user_id, limit)

    async def list_scopes(self, owner: str, user_id: str) -> tuple[StateScope, ...]:
        return await self._read(users.list_scopes, owner, user_id)

    async def forget_user(self, owner: str, user_id: str) -> Erased:
        return await self._remove(users.forget_user, owner, user_id)

    async def get_session_stats(self) -> SessionStats:
        stats = await self._look(listing.get_session_stats)
        self._count = stats.total
        return stats

    async def expire_and_purge(self, now: int, limit: int) -> tuple[int, int]:
        """Do it in steps, so that turns need not wait long for a row."""
        expired = purged = 0
        is_last = False
        while not is_last:
            fresh, is_last = await self._write(listing.sweep, now)
            expired += fresh
        line = rules.purge_line(now, self._life)
        if line is not None:
            purged = await self._purge(line, limit)
        return expired, purged

    async def _purge(self, line: int, limit: int) -> int:
        purged, sizes = 0, list(listing.PURGE_SIZES)
        while purged < limit:
            write = self._write if len(sizes) > 1 else self._remove
            try:
                gone = await write(listing.purge, line, min(limit - purged, sizes[0]))
            except TookTooLong:
                if len(sizes) == 1:
                    raise
                del sizes[0]
                continue
            purged += gone
            if not gone:
                break
        return purged

    async def list_after(self, key: SessionKey | None, limit: int) -> tuple[SessionKey, ...]:
        return await self._move_out(moving.list_after, key, limit)

    async def dump_session(self, key: SessionKey) -> SessionDump | None:
        return await self._move_out(moving.dump_session, key)

    async def load_session(self, dump: SessionDump, *, over: Session | None = None) -> None:
        await self._move_in(moving.load_session, dump, over)

    async def dump_rest(self) -> RestDump:
        return await self._move_out(moving.dump_rest)

    async def load_rest(self, rest: RestDump) -> None:
        await self._move_in(moving.load_rest, rest)
        self._count = await self._read(_count)

    async def reseal_rest(self) -> Resealed:
        return await self._move_in(moving.reseal_rest)

    async def scrub(self) -> None:
        await moving.scrub(self._link)

    async def _send_end(self, session: Session, turn: Turn, body: bytes, end: turns.End) -> Ended:
        return await self._link.run(
            lambda connection: turns.end_turn(self._view(connection), session, turn, body, end), writes=True
        )


async def _ping(view: View) -> None:
    await view.connection.execute("SELECT 1")


async def _count(view: View) -> int:
    count: int = await view.connection.fetchval(listing.COUNT_SESSIONS)
    return count
