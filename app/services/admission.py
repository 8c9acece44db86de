"""How a session comes to be, by hand or by the first message to it."""

import asyncio
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

from app.domain.errors import SessionArchived, SessionExpired, SessionNotFound
from app.domain.ids import SessionKey
from app.domain.session import DEFAULT_AGENT_ID, LifeSpan, Session, SessionQuery, SessionStatus, expiry
from app.domain.turn import JsonObject
from app.ports import AgentFactory, Clock, NewId, SessionStore


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
    # One line per user whose sessions are being made; it is gone when nobody stands in it.
    _lines: "WeakValueDictionary[tuple[str, str | None], asyncio.Lock]" = field(
        default_factory=WeakValueDictionary, init=False, repr=False
    )

    async def create(self, new: NewSession) -> Session:
        """Store a new session; without an id it gets a fresh UUIDv7.

        Raises:
            SessionExists, AgentNotFound, UnknownModel, StoreUnavailable
        """
        session = self._make(new)
        await self.store.create_session(session)
        return session

    async def resume(self, new: NewSession) -> tuple[Session, bool]:
        """Return the user's newest active session that fits, or a new one, and whether it is new.

        It fits if it has the agent and the window of ``new``, where those are given. Of
        several calls for one user at once the first makes it and the others find it.

        Raises:
            AgentNotFound, UnknownModel, StoreUnavailable
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
        async with self._line(new.owner, new.user_id):
            found = (await self.store.list_sessions(query)).sessions
            return (found[0], False) if found else (await self.create(new), True)

    def _line(self, owner: str, user_id: str | None) -> asyncio.Lock:
        return self._lines.setdefault((owner, user_id), asyncio.Lock())

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
            ttl_s=new.ttl_s,
        )
        self.factory.check(session)
        return session

    async def find(self, key: SessionKey, user_id: str | None) -> Session | None:
        """Return the session if it is there and is that of ``user_id``, which may be left out.

        Raises:
            SessionNotFound: it is another user's.
        """
        session = await self.store.find_session(key)
        if session is not None and user_id is not None and session.user_id != user_id:
            raise SessionNotFound(session_id=key.session_id)
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

    def check(self, session: Session, **choices: str | None) -> None:
        """Refuse choices that could not run.

        Raises:
            AgentNotFound, UnknownModel
        """
        given = {name: value for name, value in choices.items() if value is not None}
        self.factory.check(replace(session, **given) if given else session)  # type: ignore[arg-type]
