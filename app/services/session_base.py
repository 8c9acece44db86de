"""What the parts of ``SessionManager`` share: how a session is found, and how it is shown."""

from dataclasses import dataclass

from app.domain.errors import AgentNotFound, UnknownModel
from app.domain.ids import SessionKey
from app.domain.quota import UserKey
from app.domain.session import Session, SessionStatus
from app.pool.manager import AgentManager
from app.ports import AgentFactory, SessionStore
from app.services.admission import Admission
from app.services.holds import Holds
from app.services.ownership import Ownership
from app.services.turns import Turns

SessionRef = SessionKey | str
"""A session's address, or only its id where there is but one owner."""


def to_key(ref: SessionRef) -> SessionKey:
    return ref if isinstance(ref, SessionKey) else SessionKey("", ref)


def owners_of(owner: str, with_unowned: bool) -> tuple[str, ...]:
    """Return the owners among whose sessions a user's are: also nobody, if those count."""
    return (owner, "") if with_unowned and owner else (owner,)


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as it is now: its record, and what follows from clock, catalogue and pool.

    ``provider`` and ``model`` are those that its next turn would use.
    """

    session: Session
    status: SessionStatus
    provider: str
    model: str
    live: bool

    @property
    def session_id(self) -> str:
        return self.session.key.session_id


@dataclass(frozen=True, slots=True)
class SessionViews:
    """A page; ``total`` is ``None`` when counting would cost too much."""

    views: tuple[SessionView, ...]
    total: int | None
    next_cursor: str | None


class SessionBase:
    """A ``user_id`` that is not the session's is as good as no session."""

    def __init__(
        self,
        store: SessionStore,
        factory: AgentFactory,
        pool: AgentManager,
        turns: Turns,
        admission: Admission,
        ownership: Ownership | None = None,
    ) -> None:
        self._store = store
        self._factory = factory
        self._pool = pool
        self._turns = turns
        self._admission = admission
        self._ownership = ownership or Ownership()
        self._exports: set[UserKey] = set()  # users whose exports are under way
        self._holds = Holds(pool, turns, self._ownership)

    async def _get(self, ref: SessionRef, user_id: str | None) -> Session:
        return await self._admission.get(to_key(ref), user_id)

    def _view(self, session: Session) -> SessionView:
        try:
            provider, model = self._factory.model_of(session)
        except (AgentNotFound, UnknownModel):  # no longer offered: shown as it was chosen
            provider, model = session.provider or "", session.model or ""
        now = self._admission.clock.now_ms()
        return SessionView(
            session=session,
            status=session.status_at(now, self._admission.life),
            provider=provider,
            model=model,
            live=self._pool.is_live(session.key),
        )
