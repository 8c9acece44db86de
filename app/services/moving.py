"""Moving house: everything that one store keeps is copied to another, and read back.

Sessions are copied as wholes, a few at a time, so what is in memory at any moment does not
depend on how many there are. Nothing in the source is changed. A copy that ended early may be
repeated: whatever is there by then is stored again as it is in the source. A store may also move
into itself: then all that can be read is written anew in its place.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import sha256

from app.background import TaskOwner
from app.domain.dump import RestDump, SessionDump, canonical
from app.domain.errors import LeasedElsewhere, PreconditionFailed, SnapshotUnreadable
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.ports import MovableStore, SessionLeases

AT_ONCE = 8
"""Sessions that are under way at the same time: enough that stores share a sync of the disk."""
PAGE = 200
WAIT_S = 5.0
"""How long to wait for a session that somebody else has; most turns end sooner."""


class MoveRefused(Exception):
    """The target has something that the source has not, which a copy would destroy or mix with it."""


@dataclass(slots=True)
class Moved:
    """What was copied so far. ``json_bytes`` is the length of it as canonical JSON.

    ``unreadable`` are sessions that are broken in the source, ``differing`` those that did not
    read the same from the target, ``busy`` those that somebody else has. ``broken_states`` of users
    and applications stay as they are. ``is_complete``: the target has as many sessions as were
    copied, and the same of what belongs to none.
    """

    sessions: int = 0
    turns: int = 0
    checkpoints: int = 0
    notes: int = 0
    events: int = 0
    states: int = 0
    users: int = 0
    json_bytes: int = 0
    unreadable: list[SessionKey] = field(default_factory=list)
    differing: list[SessionKey] = field(default_factory=list)
    busy: list[SessionKey] = field(default_factory=list)
    broken_states: int = 0
    is_complete: bool = False

    @property
    def is_verified(self) -> bool:
        """Whether all that could be read is in the target as it is in the source."""
        return self.is_complete and not self.differing and not self.busy

    def count_session(self, dump: SessionDump, json_bytes: int) -> None:
        self.sessions += 1
        self.turns += len(dump.turns)
        self.checkpoints += len(dump.checkpoints)
        self.notes += len(dump.notes)
        self.events += len(dump.facts)
        self.json_bytes += json_bytes

    def count_rest(self, rest: RestDump, json_bytes: int) -> None:
        self.states += len(rest.shared)
        self.users += len({(one.owner, one.user_id) for one in rest.usage})
        self.json_bytes += json_bytes


class Mover:
    """Copies ``source`` to ``target``, both open, and nobody else uses either meanwhile.

    ``on_session`` is called after each session, whatever became of it.
    """

    def __init__(
        self, source: MovableStore, target: MovableStore, on_session: Callable[[Moved], None]
    ) -> None:
        self._source = source
        self._target = target
        self._on_session = on_session
        self._moved = Moved()

    async def check(self) -> None:
        """Refuse a target with any session that is not an earlier copy of the source's.

        Raises:
            MoveRefused
        """
        await _for_each(self._target, self._check)

    async def copy(self) -> Moved:
        """Copy everything and compare. Cancelling it leaves sessions whole, and some of them missing.

        Raises:
            SnapshotUnreadable: what belongs to no session is broken in the source; the sessions are copied.
        """
        await _for_each(self._source, self._copy)
        rest = await self._source.dump_rest()
        text = canonical(rest)
        await self._target.load_rest(rest)
        is_same = canonical(await self._target.dump_rest()) == text
        self._moved.count_rest(rest, len(text))
        self._moved.is_complete = is_same and await self._has_as_many()
        return self._moved

    async def _check(self, key: SessionKey) -> None:
        try:
            own, there = await self._source.find_session(key), await self._target.find_session(key)
        except SnapshotUnreadable:
            return  # in the source: it is left alone; in the target: it is stored anew
        if own is None:
            raise MoveRefused(f"it has session {key.session_id!r}, which the source has not")
        if there is not None and not _is_copy(there, own):
            raise MoveRefused(f"its session {key.session_id!r} has gone on, or is another than the source's")

    async def _copy(self, key: SessionKey) -> None:
        try:
            dump = await self._source.dump_session(key)
            if dump is not None and not dump.is_whole():
                raise SnapshotUnreadable(session_id=key.session_id)
        except SnapshotUnreadable:
            self._moved.unreadable.append(key)
        else:
            if dump is not None:
                await self._copy_dump(key, dump.settled())
        self._on_session(self._moved)

    async def _copy_dump(self, key: SessionKey, dump: SessionDump) -> None:
        text = canonical(dump)
        digest = sha256(text).digest()
        await self._load(dump)
        self._moved.count_session(dump, len(text))
        del dump, text  # not beside what is read back
        if await self._digest_there(key) != digest:
            self._moved.differing.append(key)

    async def _load(self, dump: SessionDump) -> None:
        await self._target.load_session(dump)

    async def _digest_there(self, key: SessionKey) -> bytes | None:
        try:
            back = await self._target.dump_session(key)
        except SnapshotUnreadable:
            return None
        return None if back is None else sha256(canonical(back)).digest()

    async def _has_as_many(self) -> bool:
        """Say whether the target lists what was copied; unreadable ones may be there from before."""
        keys, count = _Keys(self._target), 0
        left_out = {*self._moved.unreadable, *self._moved.busy}
        while (key := await keys.next()) is not None:
            count += key not in left_out
        return count == self._moved.sessions


class Rewriter(Mover):
    """Moves a store into itself.

    Nobody else should use it; but whoever does loses no turn, and no change of a session. Where there
    are leases each session is had from before it is read until it was read back, under ``nonce``, so no
    turn runs; what needs no lease is noticed by its record. A session that somebody has for longer than
    ``WAIT_S``, or that changes meanwhile, is left as it is. What belongs to no session is stored anew in
    steps of its own. Only a checkpoint that comes or goes between reading and writing is not noticed.
    """

    def __init__(self, store: MovableStore, on_session: Callable[[Moved], None], nonce: str) -> None:
        super().__init__(store, store, on_session)
        self._leases = store.leases
        self._nonce = nonce

    async def copy(self) -> Moved:
        """Write everything anew and compare."""
        await _for_each(self._source, self._copy)
        self._moved.states, self._moved.broken_states = await self._source.reseal_rest()
        self._moved.is_complete = await self._has_as_many()
        return self._moved

    async def _copy(self, key: SessionKey) -> None:
        leases = self._leases
        if leases is None:
            await super()._copy(key)
        elif await self._has_taken(leases, key):
            await super()._copy(key)
            await leases.give_back(key, self._nonce)
        else:
            self._moved.busy.append(key)
            self._on_session(self._moved)

    async def _copy_dump(self, key: SessionKey, dump: SessionDump) -> None:
        # Reading may have taken long: only what nobody has taken since is written.
        if self._leases is not None and not all(await self._leases.renew([(key, self._nonce)])):
            self._moved.busy.append(key)
            return
        try:
            await super()._copy_dump(key, dump)
        except PreconditionFailed:
            self._moved.busy.append(key)

    async def _load(self, dump: SessionDump) -> None:
        await self._target.load_session(dump, over=dump.session)

    async def _has_taken(self, leases: SessionLeases, key: SessionKey) -> bool:
        clock = asyncio.get_running_loop()
        give_up_at = clock.time() + WAIT_S
        while True:
            try:
                await leases.take(key, self._nonce)
                return True
            except LeasedElsewhere:
                if clock.time() >= give_up_at:
                    return False
                await leases.wait_free(key, give_up_at - clock.time())


class _Keys:
    """A store's sessions in their order, handed to several tasks one by one."""

    def __init__(self, store: MovableStore) -> None:
        self._store = store
        self._page: deque[SessionKey] = deque()
        self._last: SessionKey | None = None
        self._turning = asyncio.Lock()

    async def next(self) -> SessionKey | None:
        async with self._turning:  # one turns the page, the others wait for it
            if not self._page:
                self._page.extend(await self._store.list_after(self._last, PAGE))
            if not self._page:
                return None
            self._last = self._page.popleft()
            return self._last


async def _for_each(store: MovableStore, work: Callable[[SessionKey], Awaitable[None]]) -> None:
    """Do ``work`` with every session of ``store``, a few at a time; the first failure ends it."""
    keys, owner = _Keys(store), TaskOwner("moving")

    async def work_on() -> None:
        while (key := await keys.next()) is not None:
            await work(key)

    try:
        await asyncio.gather(*(owner.spawn(work_on(), f"{n}", is_awaited=True) for n in range(AT_ONCE)))
    finally:
        await owner.close()


def _is_copy(there: Session, own: Session) -> bool:
    """Say whether ``there`` is ``own`` as it is or was."""
    return there.uid == own.uid and all(
        getattr(there, name) <= getattr(own, name) for name in ("last_accessed", "rev", "state_rev")
    )
