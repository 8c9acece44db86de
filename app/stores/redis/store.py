"""A store in Redis, which any number of processes share.

All that is one step for others is one script of the server's (``stores/lua``); the rules are Python's.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from app.domain.branch import HeadTarget
from app.domain.checkpoint import AutoCheckpoint, Checkpoint, CheckpointPage
from app.domain.compaction import Note
from app.domain.dump import RestDump, SessionDump
from app.domain.erasure import Erased
from app.domain.errors import SessionExists, SessionLimit, StoreUnavailable, TurnNotFound
from app.domain.ids import SessionKey
from app.domain.journal import Entry, Position
from app.domain.lease import LEASE_S, Node
from app.domain.session import LifeSpan, Path, Session, SessionCap, SessionChange, SessionPage, SessionQuery
from app.domain.state import SharedState, StateScope
from app.domain.stats import SessionStats, UserUsage
from app.domain.turn import BoundTurn, JsonObject, Turn, TurnPage, Usage
from app.ports.moving import Resealed
from app.stores import rules
from app.stores.ensuring import EnsuresInTwoSteps
from app.stores.redis import listing, moving, records, side, sums, tree, turns, users
from app.stores.redis.address import Address
from app.stores.redis.database import Database
from app.stores.redis.draft import new_draft
from app.stores.redis.ground import Fence, check_ground
from app.stores.redis.leases import Held, RedisLeases, node_word
from app.stores.redis.wakeups import Wakeups
from app.stores.redis.wire import Wire
from app.stores.sealing import Keys, Sealer

if TYPE_CHECKING:
    from redis.asyncio import Redis

MAX_FSYNC_WAIT_MS = 900
_REAPED_AT_ONCE = 100


class RedisStore(EnsuresInTwoSteps):
    """``address`` is a URL, or a client, whose settings are used and which stays open.

    ``prefix`` begins every key. ``fsync_wait_ms``: how long a write waits until it is on disk, 0 for not
    at all. ``accept_volatile``: a server that may lose what it has acknowledged is warned of, not refused.
    With ``keys`` all content is encrypted.

    Raises:
        ValueError: the URL is none, or a number is out of range.
    """

    def __init__(
        self,
        address: "str | Redis",
        life: LifeSpan,
        *,
        prefix: str = "agentpool",
        lease_s: float = LEASE_S,
        fsync_wait_ms: int = 0,
        accept_volatile: bool = False,
        keys: Keys | None = None,
    ) -> None:
        if not 0 <= fsync_wait_ms <= MAX_FSYNC_WAIT_MS:
            raise ValueError(f"fsync_wait_ms must be 0 to {MAX_FSYNC_WAIT_MS}.")
        self._address = Address(address)
        self._life = life
        self._prefix = prefix
        self._fsync_wait_ms = fsync_wait_ms
        self._accept_volatile = accept_volatile
        self._sealer = Sealer(keys)
        self._held = Held()
        self._leases = RedisLeases(self._held, lease_s)
        self._wires: list[Wire] = []

    @property
    def leases(self) -> RedisLeases:
        return self._leases

    @property
    def _db(self) -> Database:
        return self._held.open_db

    async def open(self, boot_id: str, node_url: str | None = None) -> None:
        """Open, having looked whether the server keeps what it acknowledges.

        Raises:
            ValueError: it does not, or is no single primary.
            StoreUnavailable: it cannot be reached.
        """
        if self._held.db is not None:
            self._held.db.node = Node(boot_id, node_url)
            return
        wire = self._new_wire()
        try:
            await wire.open()
            await check_ground(wire, accept_volatile=self._accept_volatile, fsync_wait_ms=self._fsync_wait_ms)
            fence = None
            if self._fsync_wait_ms:
                fence = Fence(self._new_wire(), self._prefix, self._fsync_wait_ms)
            lease_ms = round(self._leases.duration_s * 1000)
            db = Database(
                wire, self._prefix, self._life, Node(boot_id, node_url), lease_ms, fence, self._sealer
            )
            db.session_count = await db.read("ZCARD", db.name("z:all"))
            self._held.wakeups = Wakeups(self._address.connect, self._prefix)
            self._held.db = db
            await db.tell("boot", boot_id, lease_ms)
            await sums.sweep(db)  # another idle time counts from now on, not from the next sweep
            lapsed = _REAPED_AT_ONCE
            while lapsed == _REAPED_AT_ONCE:
                lapsed, _ = await db.tell("reap", _REAPED_AT_ONCE, repeats=False)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close; what this boot still has is free for others at once."""
        db, self._held.db = self._held.db, None
        wakeups = self._held.wakeups
        if db is not None:
            with suppress(StoreUnavailable):
                await db.tell("boot", db.node.boot_id, 0, node_word(db.node))
            await db.close()
        if wakeups is not None:
            self._held.wakeups = None
            await wakeups.close()
        while self._wires:
            await self._wires.pop(0).close()
        await self._address.close()

    async def ping(self) -> None:
        await self._db.read("PING")

    def session_count_nowait(self) -> int | None:
        return None if self._held.db is None else self._held.db.session_count

    async def create_session(self, session: Session) -> None:
        (refusal,) = await records.create(self._db, [new_draft(self._sealer, session)])
        if refusal is not None:
            raise refusal

    async def create_sessions(
        self, sessions: Sequence[Session], cap: SessionCap | None = None
    ) -> tuple[SessionExists | SessionLimit | None, ...]:
        return await records.create(self._db, [new_draft(self._sealer, session) for session in sessions], cap)

    async def list_oldest(self, owner: str, user_id: str, limit: int) -> tuple[Session, ...]:
        return await listing.list_oldest(self._db, owner, user_id, limit)

    async def find_session(self, key: SessionKey) -> Session | None:
        record = await self._db.find_record(key)
        return None if record is None else record.session

    def recall_session(self, key: SessionKey) -> Session | None:
        record = self._held.db and self._held.db.seen.find(key)
        return record.session if record else None

    async def list_sessions(self, query: SessionQuery) -> SessionPage:
        return await listing.list_sessions(self._db, query)

    async def update_session(
        self, key: SessionKey, change: SessionChange, now: int, *, expected_etag: str | None = None
    ) -> Session:
        return await records.update_session(self._db, key, change, now, expected_etag)

    async def patch_state(
        self, key: SessionKey, patch: JsonObject, now: int, *, expected_rev: int | None = None
    ) -> Session:
        return await records.patch_state(self._db, key, patch, now, expected_rev)

    async def get_shared(self, scope: StateScope) -> SharedState:
        return await records.get_shared(self._db, scope)

    async def patch_shared(
        self, scope: StateScope, patch: JsonObject, now: int, *, expected_rev: int | None = None
    ) -> SharedState:
        return await records.patch_shared(self._db, scope, patch, now, expected_rev)

    async def touch_session(self, key: SessionKey, now: int) -> Session:
        return await records.touch_session(self._db, key, now)

    async def delete_session(self, key: SessionKey) -> bool:
        return (await records.remove(self._db, [key])).sessions == 1

    async def delete_sessions(self, keys: Sequence[SessionKey]) -> Erased:
        return await records.remove(self._db, keys)

    async def list_keys(
        self, owner: str | None, *, user_id: str | None = None, agent_id: str | None = None, limit: int
    ) -> tuple[SessionKey, ...]:
        return await listing.list_keys(self._db, owner, user_id, agent_id, limit)

    async def load_path(self, session: Session) -> Path:
        return await tree.load_path(self._db, session)

    async def at_turn(self, session: Session, turn_id: str | None) -> Session:
        record = await self._db.find_record(session.key, session.uid)
        if record is None:
            raise TurnNotFound(session_id=session.key.session_id, turn_id=turn_id)
        return rules.at_place(session, (await tree.spot_at(self._db, record, turn_id)).place)

    async def move_head(self, session: Session, target: HeadTarget, now: int) -> Session:
        return await records.move_head(self._db, session, target, now)

    async def fork_session(
        self, origin: Session, target: HeadTarget | None, new: Session, cap: SessionCap | None = None
    ) -> Session:
        return await records.fork_session(self._db, origin, target, new, cap)

    async def add_checkpoint(self, session: Session, checkpoint: Checkpoint) -> Checkpoint:
        return await side.add_checkpoint(self._db, session, checkpoint)

    async def list_checkpoints(
        self, session: Session, limit: int, cursor: str | None = None
    ) -> CheckpointPage:
        return await side.list_checkpoints(self._db, session, limit, cursor)

    async def get_checkpoint(self, session: Session, checkpoint_id: str) -> Checkpoint:
        return await side.get_checkpoint(self._db, session, checkpoint_id)

    async def delete_checkpoints(self, session: Session, checkpoint_id: str | None = None) -> int:
        return await side.delete_checkpoints(self._db, session, checkpoint_id)

    async def add_note(self, session: Session, note: Note, usage: Usage) -> Session:
        return await side.add_note(self._db, session, note, usage)

    async def get_note(self, session: Session) -> Note | None:
        return await tree.get_note(self._db, session)

    async def list_notes(self, session: Session) -> tuple[Note, ...]:
        return await tree.list_notes(self._db, session)

    async def list_entries(
        self, session: Session, position: Position | None, limit: int, *, newest_first: bool
    ) -> tuple[Entry, ...]:
        return await side.list_entries(self._db, session, position, limit, newest_first=newest_first)

    async def start_turn(self, session: Session, turn: Turn) -> Session | None:
        return await turns.start_turn(self._db, session, turn)

    async def commit_turn(
        self,
        session: Session,
        turn: Turn,
        *,
        resets_state: bool = False,
        checkpoint: AutoCheckpoint | None = None,
    ) -> Session:
        return await turns.commit_turn(self._db, session, turn, resets_state, checkpoint)

    async def record_turn(self, session: Session, turn: Turn) -> None:
        await turns.record_turn(self._db, session, turn)

    async def find_bound(self, owner: str, key: str) -> BoundTurn | None:
        return await listing.find_bound(self._db, owner, key)

    async def get_turn(self, session: Session, turn_id: str) -> Turn:
        return await listing.get_turn(self._db, session, turn_id)

    async def list_turns(self, session: Session, limit: int, cursor: str | None = None) -> TurnPage:
        return await listing.list_turns(self._db, session, limit, cursor)

    async def list_branch(self, session: Session, limit: int, before: str | None = None) -> tuple[Turn, ...]:
        return await listing.list_branch(self._db, session, limit, before)

    async def get_usage(self, owner: str, user_id: str, limit: int) -> UserUsage:
        return await sums.get_usage(self._db, owner, user_id, limit)

    async def list_scopes(self, owner: str, user_id: str) -> tuple[StateScope, ...]:
        return await users.list_scopes(self._db, owner, user_id)

    async def forget_user(self, owner: str, user_id: str) -> Erased:
        return await users.forget_user(self._db, owner, user_id)

    async def get_session_stats(self) -> SessionStats:
        return await sums.get_session_stats(self._db)

    async def expire_and_purge(self, now: int, limit: int) -> tuple[int, int]:
        return await sums.expire_and_purge(self._db, now, limit)

    async def list_after(self, key: SessionKey | None, limit: int) -> tuple[SessionKey, ...]:
        return await listing.list_after(self._db, key, limit)

    async def dump_session(self, key: SessionKey) -> SessionDump | None:
        return await moving.dump_session(self._db, key)

    async def load_session(self, dump: SessionDump, *, over: Session | None = None) -> None:
        await moving.load_session(self._db, dump, over)

    async def dump_rest(self) -> RestDump:
        return await moving.dump_rest(self._db)

    async def load_rest(self, rest: RestDump) -> None:
        await moving.load_rest(self._db, rest)

    async def reseal_rest(self) -> Resealed:
        return await moving.reseal_rest(self._db)

    async def scrub(self) -> None:
        """Begin to write the append-only file anew; a snapshot is replaced by the next one."""
        await self._db.wire.call("BGREWRITEAOF")

    def _new_wire(self) -> Wire:
        self._wires.append(Wire(self._address.connect, self._prefix))
        return self._wires[-1]
