"""How a session comes to be, by hand or by the first message to it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Container, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

from app.domain.branch import HeadTarget
from app.domain.chat import Choices
from app.domain.errors import (
    AgentNotFound,
    AgentPoolError,
    HeadMoved,
    InvalidInput,
    SessionArchived,
    SessionBusy,
    SessionExists,
    SessionExpired,
    SessionLimit,
    SessionNotFound,
    UnknownModel,
)
from app.domain.ids import SessionKey
from app.domain.quota import UserKey
from app.domain.session import (
    DEFAULT_AGENT_ID,
    LifeSpan,
    Session,
    SessionCap,
    SessionQuery,
    SessionStatus,
    Unset,
    expiry,
)
from app.domain.turn import JsonObject
from app.pool.manager import AgentManager
from app.ports import AgentFactory, Clock, NewId, SessionStore
from app.services.ownership import Manners, Ownership
from app.services.turns import Turns

EVICTION_TRIES = 5
"""How often other victims are looked for when those that were found became active."""
SPARE = 16
"""More candidates than needed, since some may be busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSession:
    """What the maker of a session may choose; ``None`` leaves it to the defaults."""

    owner: str = ""
    session_id: str | None = None
    user_id: str | None = None
    window_id: str | None = None
    agent_id: str | None = None
    app_name: str | None = None
    title: str | None = None
    metadata: JsonObject = field(default_factory=dict)
    provider: str | None = None
    model: str | None = None
    params: JsonObject = field(default_factory=dict)
    state: JsonObject = field(default_factory=dict)
    template: JsonObject | None = None
    ttl_s: int | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """Makes sessions and lets callers in to those they may use."""

    store: SessionStore
    factory: AgentFactory
    clock: Clock
    new_id: NewId
    life: LifeSpan
    app_name: str = "default"
    max_per_user: int = 0  # 0: no cap
    evicts_oldest: bool = True  # else a session too many is refused
    pool: AgentManager | None = None  # needed for eviction, as the next
    turns: Turns | None = None
    ownership: Ownership = field(default_factory=Ownership)
    # One line per user whose sessions are being made; it is gone when nobody stands in it.
    _lines: "WeakValueDictionary[tuple[str, str | None], asyncio.Lock]" = field(
        default_factory=WeakValueDictionary, init=False, repr=False
    )

    _barred: dict[UserKey, float] = field(default_factory=dict, init=False, repr=False)

    def bar(self, user: UserKey, for_s: float) -> None:
        """Refuse new sessions of a user who is being erased, for so many seconds; 0: not any more."""
        now = self.clock.monotonic()
        for one, until in list(self._barred.items()):
            if one == user or until <= now:
                del self._barred[one]
        if for_s:
            self._barred[user] = now + for_s

    async def create(self, new: NewSession) -> Session:
        """Store a new session; without an id it gets a fresh UUIDv7.

        Raises:
            SessionExists, SessionLimit, AgentNotFound, UnknownModel, StoreUnavailable
            InvalidInput: the template names a capability that the agent has not.
            SessionBusy: the user is being erased; so it is wherever sessions are made.
        """
        session = self._make(new)
        async with self._in_line([session]):
            return await self._add(session)

    async def ensure(self, new: NewSession, user_id: str | None) -> Session:
        """Return the session that ``new`` names, made if there is none, in one step where that is possible.

        Raises:
            SessionNotFound: it is another user's.
            AgentNotFound, UnknownModel, InvalidInput: it could not be made, whether it is there or not.
            SessionLimit, StoreUnavailable
        """
        session = self._make(new)
        if not self.max_per_user or session.user_id is None:
            return self._check_user(await self.store.ensure_session(session), user_id)
        try:
            return await self.find(session.key, user_id) or await self.create(new)
        except SessionExists:  # somebody else's first message came in between
            return await self.get(session.key, user_id)

    async def create_many(self, news: Sequence[NewSession]) -> list[Session | AgentPoolError]:
        """Store new sessions in one commit; return each, or why it was refused.

        Raises:
            StoreUnavailable
        """
        results: list[Session | AgentPoolError] = []
        for new in news:
            try:
                results.append(self._make(new))
            except (AgentNotFound, UnknownModel, InvalidInput, SessionBusy) as refusal:
                results.append(refusal)
        made = [result for result in results if isinstance(result, Session)]
        async with self._in_line(made):
            refusals = dict(zip((s.uid for s in made), await self._add_all(made), strict=True))
        return [(refusals[r.uid] or r) if isinstance(r, Session) else r for r in results]

    async def fork(
        self, origin: Session, target: HeadTarget | None, session_id: str | None, metadata: JsonObject | None
    ) -> Session:
        """Store a copy of ``origin`` that goes on from ``target``; its own ``metadata``, or the origin's.

        It takes a place among the user's sessions, but never the origin's.

        Raises:
            SessionExists, SessionLimit, SessionNotFound, TurnNotFound, CheckpointNotFound,
            InvalidInput, SnapshotUnreadable, StoreUnavailable
        """
        new = self._copy_of(origin, session_id, metadata)
        if not self.max_per_user or new.user_id is None:
            return await self.store.fork_session(origin, target, new)
        async with self._in_line([new]):
            for left in reversed(range(EVICTION_TRIES)):
                spared = {origin.uid}
                victims = await self._pick_victims([new], spared=spared) if self.evicts_oldest else []
                async with self._held(victims) as held:
                    cap = SessionCap(self.max_per_user, tuple(held))
                    try:
                        return await self.store.fork_session(origin, target, new, cap)
                    except SessionLimit:
                        if not left or not victims:
                            raise
        raise AssertionError("the last try returns or raises")

    async def resume(self, new: NewSession) -> tuple[Session, bool]:
        """Return the user's newest active session that fits, or a new one, and whether it is new.

        It fits if it has the agent and the window of ``new``, where those are given. Of
        several calls for one user at once the first makes it and the others find it.

        Raises:
            SessionLimit, AgentNotFound, UnknownModel, StoreUnavailable
        """
        query = SessionQuery(
            owner=new.owner,
            now=self.clock.now_ms(),
            limit=1,
            user_id=new.user_id,
            agent_id=new.agent_id,
            window_id=new.window_id,
            status=SessionStatus.ACTIVE,
        )
        # No session is called so: its id has no space.
        line = SessionKey(new.owner, f"user {new.user_id}")
        async with self._line(new.owner, new.user_id), self.ownership.hold(line, Manners()):
            found = (await self.store.list_sessions(query)).sessions
            return (found[0], False) if found else (await self._add(self._make(new)), True)

    def _line(self, owner: str, user_id: str | None) -> asyncio.Lock:
        return self._lines.setdefault((owner, user_id), asyncio.Lock())

    @asynccontextmanager
    async def _in_line(self, sessions: Sequence[Session]) -> AsyncIterator[None]:
        """Make sessions of a capped user one call after the other: who comes later evicts who came before."""
        users = {(s.key.owner, s.user_id) for s in sessions if self.max_per_user and s.user_id is not None}
        async with AsyncExitStack() as lines:
            for owner, user_id in sorted(users):  # in one order for all: no two wait for each other
                await lines.enter_async_context(self._line(owner, user_id))
            yield

    async def _add(self, session: Session) -> Session:
        if not self.max_per_user or session.user_id is None:
            await self.store.create_session(session)
        elif (refusal := (await self._add_all([session]))[0]) is not None:
            raise refusal
        return session

    async def _add_all(self, sessions: Sequence[Session]) -> list[SessionExists | SessionLimit | None]:
        """Store sessions of users in whose lines this call stands; return why each was refused.

        Victims are held while they are evicted: a turn of one either came before, and the
        victim is spared, or waits until it is gone. The store spares one that was active since
        it was listed; then others are looked for.
        """
        if not self.max_per_user:
            return list(await self.store.create_sessions(sessions))
        outcomes: dict[str, SessionExists | SessionLimit | None] = {}
        rest = list(sessions)
        for _ in range(EVICTION_TRIES):
            victims = await self._pick_victims(rest, spared=outcomes) if self.evicts_oldest else []
            async with self._held(victims) as held:
                cap = SessionCap(self.max_per_user, tuple(held))
                refusals = await self.store.create_sessions(rest, cap)
            outcomes |= zip((session.uid for session in rest), refusals, strict=True)
            rest = [session for session in rest if isinstance(outcomes[session.uid], SessionLimit)]
            if not rest or not victims:
                break
        return [outcomes[session.uid] for session in sessions]

    async def _pick_victims(self, sessions: Sequence[Session], *, spared: Container[str]) -> list[Session]:
        """Return who must go for ``sessions``: of each user the oldest without a turn.

        ``spared``: incarnations that stay, such as those that this very call has made.
        """
        victims: list[Session] = []
        users = Counter((s.key.owner, s.user_id) for s in sessions if s.user_id is not None)
        for (owner, user_id), count in users.items():
            query = SessionQuery(owner=owner, now=0, limit=1, user_id=user_id)
            total = (await self.store.list_sessions(query)).total or 0
            victims += await self._list_free(owner, user_id, total + count - self.max_per_user, spared)
        return victims

    async def _list_free(self, owner: str, user_id: str, count: int, spared: Container[str]) -> list[Session]:
        limit = count + SPARE
        while count > 0:
            oldest = await self.store.list_oldest(owner, user_id, limit)
            free = [s for s in oldest if s.uid not in spared and not self._has_turns(s)]
            if len(free) >= count or len(oldest) < limit:
                return free[:count]
            limit *= 2
        return []

    @asynccontextmanager
    async def _held(self, victims: Sequence[Session]) -> AsyncIterator[list[Session]]:
        """Hold those that still have no turn; their live agents are dropped."""
        held: list[Session] = []
        async with AsyncExitStack() as holds:
            for victim in sorted(victims, key=lambda session: session.key):  # as deletes do
                # No await between: a turn that comes now waits behind the hold.
                if self.pool is not None and not self._has_turns(victim):
                    await holds.enter_async_context(self.pool.hold(victim.key))
                    held.append(victim)
            yield sorted(held, key=lambda session: session.last_accessed)

    def _has_turns(self, session: Session) -> bool:
        return self.turns is not None and bool(self.turns.of_session(session.key))

    def _make(self, new: NewSession) -> Session:
        """Return the record of a new session that could run."""
        now = self.clock.now_ms()
        session = Session(
            key=SessionKey(new.owner, new.session_id or self.new_id()),
            uid=self.new_id(),
            app_name=new.app_name or self.app_name,
            agent_id=new.agent_id or DEFAULT_AGENT_ID,
            created_at=now,
            updated_at=now,
            last_accessed=now,
            expires_at=expiry(now, new.ttl_s, self.life),
            user_id=new.user_id,
            window_id=new.window_id,
            title=new.title,
            provider=new.provider,
            model=new.model,
            params=new.params,
            metadata=new.metadata,
            state=new.state,
            template=new.template,
            ttl_s=new.ttl_s,
        )
        self._check_barred(session)
        self.factory.check(session)
        return session

    def _check_barred(self, session: Session) -> None:
        if not self._barred:
            return
        owner = session.key.owner
        users = {(owner, owner), (owner, session.user_id or "")}  # of an owner who is the user all goes
        if any(self._barred.get(user, 0.0) > self.clock.monotonic() for user in users):
            raise SessionBusy("This user is being erased.", retry_after_s=1)

    def _copy_of(self, origin: Session, session_id: str | None, metadata: JsonObject | None) -> Session:
        now = self.clock.now_ms()
        self._check_barred(origin)
        return replace(
            origin,
            key=SessionKey(origin.key.owner, session_id or self.new_id()),
            uid=self.new_id(),
            metadata=origin.metadata if metadata is None else metadata,
            created_at=now,
            updated_at=now,
            last_accessed=now,
            expires_at=expiry(now, origin.ttl_s, self.life),
            archived=False,
            marked_idle=False,
            head=None,
            note=None,
            depth=0,
            rev=1,
            state={},
            state_rev=0,
        )

    async def find(self, key: SessionKey, user_id: str | None) -> Session | None:
        """Return the session if it is there and is that of ``user_id``, which may be left out.

        Raises:
            SessionNotFound: it is another user's.
        """
        session = await self.store.find_session(key)
        return None if session is None else self._check_user(session, user_id)

    def _check_user(self, session: Session, user_id: str | None) -> Session:
        if user_id is not None and session.user_id != user_id:
            raise SessionNotFound(session_id=session.key.session_id)
        return session

    async def get(self, key: SessionKey, user_id: str | None) -> Session:
        """As ``find``, but a session that is not there raises ``SessionNotFound``, too."""
        session = await self.find(key, user_id)
        if session is None:
            raise SessionNotFound(session_id=key.session_id)
        return session

    def require_open(self, session: Session) -> None:
        """Refuse turns in a session whose life does not allow them.

        Raises:
            SessionArchived, SessionExpired
        """
        status = session.status_at(self.clock.now_ms(), self.life)
        if status is SessionStatus.ARCHIVED:
            raise SessionArchived(session_id=session.key.session_id)
        if status is SessionStatus.EXPIRED:
            raise SessionExpired(session_id=session.key.session_id)

    def require_head(self, session: Session, expected: str | Unset | None) -> None:
        """Refuse to go on from another head than ``expected``, where that is given.

        Raises:
            HeadMoved
        """
        if not isinstance(expected, Unset) and session.head != expected:
            raise HeadMoved(session_id=session.key.session_id)

    async def leave_what_is_gone(self, session: Session, choices: Choices) -> Session:
        """Store ``choices`` at once if what ``session`` chose before is not offered any more.

        Otherwise they wait until their turn has the session. Here no agent could be made
        for it to have: not by this turn, nor by one before it.
        """
        try:
            self.factory.check(session)
        except (AgentNotFound, UnknownModel):
            change = choices.change_of(session)
            if change is not None:
                return await self.store.update_session(session.key, change, self.clock.now_ms())
        return session

    def check(self, session: Session, **choices: str | None) -> None:
        """Refuse choices that could not run.

        Raises:
            AgentNotFound, UnknownModel
        """
        given = {name: value for name, value in choices.items() if value is not None}
        self.factory.check(replace(session, **given) if given else session)  # type: ignore[arg-type]
