"""Stores in plain dictionaries that several runtimes of one process share, as nodes share a database."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from secrets import token_urlsafe
from typing import Self

from app.domain.checkpoint import AutoCheckpoint
from app.domain.dump import SessionDump
from app.domain.erasure import Erased
from app.domain.errors import HeadMoved, KeyTaken, LeasedElsewhere
from app.domain.idempotency import Binding
from app.domain.ids import SessionKey
from app.domain.lease import LEASE_S, Holder, Node
from app.domain.session import LifeSpan, Session
from app.domain.turn import BoundTurn, Turn, TurnStatus
from app.stores import rules
from app.stores.memory.record import Record
from app.stores.memory.store import MemoryStore


@dataclass(frozen=True, slots=True)
class Lease:
    """Who has a session, and until when."""

    holder: Holder
    until: float


@dataclass(slots=True)
class _Content:
    """What all stores beside each other know of who is there, by the event loop's clock."""

    leases: dict[SessionKey, Lease] = field(default_factory=dict)
    nodes: dict[Node, float] = field(default_factory=dict)
    waiters: dict[SessionKey, set["asyncio.Future[None]"]] = field(default_factory=dict)
    secret: str = field(default_factory=partial(token_urlsafe, 32))


class SharedMemoryStore(MemoryStore):
    """A memory store with leases; ``beside`` gives the next process's view of it."""

    def __init__(self, life: LifeSpan, *, lease_s: float = LEASE_S) -> None:
        super().__init__(life)
        self._content = _Content()
        self._lease_s = lease_s
        self._leases = MemoryLeases(self, self._content, lease_s)
        self._seen: dict[SessionKey, Session] = {}

    @property
    def leases(self) -> "MemoryLeases":  # type: ignore[override]  # there are some here
        return self._leases

    def beside(self) -> Self:
        """Return another store of the same content, for another runtime to open."""
        other = copy(self)
        other._leases = MemoryLeases(other, self._content, self._lease_s)
        other._seen = {}
        return other

    def recall_session(self, key: SessionKey) -> Session | None:  # type: ignore[override]
        return self._seen.get(key)

    async def find_session(self, key: SessionKey) -> Session | None:
        return self._see(key, await super().find_session(key))

    async def load_session(self, dump: SessionDump, *, over: Session | None = None) -> None:
        lease = self._content.leases.get(dump.session.key)
        await super().load_session(dump, over=over)
        if lease is not None:
            self._content.leases[dump.session.key] = lease

    async def delete_session(self, key: SessionKey) -> bool:
        self._seen.pop(key, None)
        return await super().delete_session(key)

    async def open(self, boot_id: str, node_url: str | None = None) -> None:
        self._is_closed = False
        self._boot_id = boot_id
        self._leases.node = Node(boot_id, node_url)

    async def close(self) -> None:
        self._leases.end_own()
        await super().close()

    async def start_turn(self, session: Session, turn: Turn) -> Session | None:
        self._see(session.key, None)  # whatever it was, it is compared now
        record = self._get(session)
        self._check_key(turn, record)
        self._leases.take_now(session.key, Holder(self._leases.node, turn.turn_id, is_turn=True))
        known = record.turns.get(turn.turn_id)
        if known is not None:
            if known.status is not TurnStatus.RUNNING:
                self._leases.give_back_now(session.key, turn.turn_id)
                raise HeadMoved(session_id=session.key.session_id, turn_id=turn.turn_id)
            return None
        self._see(session.key, record.session)
        if _version(record.session) != _version(session):
            return record.session
        self._put(record, turn)
        record.session = record.session.touched(turn.started_at, self._life)
        return None

    async def commit_turn(
        self,
        session: Session,
        turn: Turn,
        *,
        resets_state: bool = False,
        checkpoint: AutoCheckpoint | None = None,
    ) -> Session:
        committed = await super().commit_turn(session, turn, resets_state=resets_state, checkpoint=checkpoint)
        self._leases.give_back_now(session.key, turn.turn_id)
        self._see(session.key, committed)
        return committed

    async def record_turn(self, session: Session, turn: Turn) -> None:
        await super().record_turn(session, turn)
        self._leases.give_back_now(session.key, turn.turn_id)

    async def find_bound(self, owner: str, key: str) -> BoundTurn | None:
        self._check_open()
        bound = self._keys.find(Binding(owner, key, b""))
        if bound is not None and not bound.record.turns[bound.turn_id].is_committed:
            holder = self._leases.find(bound.record.session.key)
            if holder is not None and holder.nonce == bound.turn_id:
                raise KeyTaken(holder, turn_id=bound.turn_id)
        return await super().find_bound(owner, key)

    def end_abandoned(self, key: SessionKey, turn_id: str) -> bool:
        """Fail the turn of a lease that has run out, if it is still said to run."""
        record = self._records.get(key)
        turn = record.turns.get(turn_id) if record is not None else None
        if record is None or turn is None or turn.status is not TurnStatus.RUNNING:
            return False
        self._put(record, rules.interrupted(turn, turn.started_at))
        return True

    def forget_start(self, key: SessionKey, turn_id: str) -> None:
        """Take the start record of a turn away that has not ended."""
        record = self._records.get(key)
        turn = record.turns.get(turn_id) if record is not None else None
        if record is not None and turn is not None and turn.status is TurnStatus.RUNNING:
            self._keys.release(record, turn_id)
            del record.turns[turn_id], record.sizes[turn_id]

    def _see(self, key: SessionKey, session: Session | None) -> Session | None:
        if session is None:
            self._seen.pop(key, None)
        else:
            self._seen[key] = session
        return session

    def _has_running(self, record: Record) -> bool:
        lease = self._leases.find(record.session.key)
        return lease is not None and lease.is_turn

    def _remove(self, key: SessionKey) -> Erased:
        erased = super()._remove(key)
        self._leases.drop(key)
        return erased

    def _check_key(self, turn: Turn, record: Record) -> None:
        bound = self._keys.find(turn.binding)
        if bound is None or (bound.record is record and bound.turn_id == turn.turn_id):
            return
        if bound.record.turns[bound.turn_id].is_committed:
            raise KeyTaken(None, turn_id=bound.turn_id)
        key = bound.record.session.key
        holder = self._leases.find(key)
        if holder is not None and holder.nonce == bound.turn_id:
            raise KeyTaken(holder, session_id=key.session_id, turn_id=bound.turn_id)
        self._leases.give_back_now(key, bound.turn_id)  # or it could be renewed
        self.end_abandoned(key, bound.turn_id)


class MemoryLeases:
    """The leases as one of the stores sees them. Whatever changes is done in one step."""

    def __init__(self, store: SharedMemoryStore, content: _Content, duration_s: float) -> None:
        self._store = store
        self._content = content
        self._duration_s = duration_s
        self.node = Node("")

    @property
    def duration_s(self) -> float:
        return self._duration_s

    async def take(self, key: SessionKey, nonce: str) -> None:
        self._store._check_open()
        self.take_now(key, Holder(self.node, nonce, is_turn=False))

    async def renew(self, held: Sequence[tuple[SessionKey, str]]) -> tuple[bool, ...]:
        self._store._check_open()
        return tuple(self._renew(key, nonce) for key, nonce in held)

    async def give_back(self, key: SessionKey, nonce: str) -> None:
        self._store._check_open()
        lease = self._content.leases.get(key)
        if lease is not None and lease.holder.nonce == nonce:
            self._store.forget_start(key, nonce)
            self.give_back_now(key, nonce)

    async def holder(self, key: SessionKey) -> Holder | None:
        self._store._check_open()
        return self.find(key)

    async def wait_free(self, key: SessionKey, limit_s: float) -> None:
        self._store._check_open()
        lease = self._content.leases.get(key)
        if lease is None:
            return
        future = asyncio.get_running_loop().create_future()
        waiters = self._content.waiters.setdefault(key, set())
        waiters.add(future)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(limit_s, max(0.0, lease.until - _now()))):
                    await future
        finally:
            waiters.discard(future)
            if not waiters and self._content.waiters.get(key) is waiters:
                del self._content.waiters[key]

    async def reap(self, limit: int) -> int:
        self._store._check_open()
        lapsed = [key for key in self._content.leases if self.find(key) is None][:limit]
        return sum(self.drop(key) for key in lapsed)

    async def announce(self) -> None:
        self._store._check_open()
        self._content.nodes[self.node] = _now() + self._duration_s

    async def nodes(self) -> tuple[Node, ...]:
        self._store._check_open()
        return tuple(node for node, until in self._content.nodes.items() if until > _now())

    async def secret(self) -> str:
        self._store._check_open()
        return self._content.secret

    def find(self, key: SessionKey) -> Holder | None:
        """Return who has the session by a lease that has not run out."""
        lease = self._content.leases.get(key)
        return lease.holder if lease is not None and lease.until > _now() else None

    def take_now(self, key: SessionKey, wanted: Holder) -> None:
        holder = self.find(key)
        if holder is not None and holder.nonce != wanted.nonce:
            raise LeasedElsewhere(holder, session_id=key.session_id)
        if holder is None:
            self.drop(key, unless=wanted.nonce)
        self._content.leases[key] = Lease(wanted, _now() + self._duration_s)

    def give_back_now(self, key: SessionKey, nonce: str) -> None:
        lease = self._content.leases.get(key)
        if lease is not None and lease.holder.nonce == nonce:
            self.drop(key, unless=nonce)

    def end_own(self) -> None:
        """Let the leases of this process run out, and wake who waits for one."""
        for key, lease in self._content.leases.items():
            if lease.holder.node == self.node:
                self._content.leases[key] = replace(lease, until=min(lease.until, _now()))
                self._wake(key)

    def drop(self, key: SessionKey, *, unless: str | None = None) -> bool:
        """Take the lease away and wake who waits; say whether that ended a turn (not that of ``unless``)."""
        lease = self._content.leases.pop(key, None)
        self._wake(key)
        if lease is None or lease.holder.nonce == unless:
            return False
        return self._store.end_abandoned(key, lease.holder.nonce)

    def _wake(self, key: SessionKey) -> None:
        for waiter in self._content.waiters.pop(key, ()):
            if not waiter.done():
                waiter.set_result(None)

    def _renew(self, key: SessionKey, nonce: str) -> bool:
        lease = self._content.leases.get(key)
        if lease is None or lease.holder.nonce != nonce:
            return False
        self._content.leases[key] = replace(lease, until=_now() + self._duration_s)
        return True


def _version(session: Session) -> tuple[object, ...]:
    return session.uid, session.head, session.note, session.rev, session.state_rev


def _now() -> float:
    return asyncio.get_running_loop().time()
