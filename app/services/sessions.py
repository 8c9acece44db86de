"""Sessions."""

from dataclasses import dataclass, field

from app.domain.ids import SessionKey
from app.domain.session import Session, SessionChange, SessionStatus
from app.domain.turn import JsonObject, Turn, TurnPage


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSession:
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
class SessionView:
    """A session as it is now: its record, and what follows from clock, catalogue and pool."""

    session: Session
    status: SessionStatus
    provider: str
    model: str
    live: bool


@dataclass(frozen=True, slots=True)
class SessionViews:
    views: tuple[SessionView, ...]
    total: int | None
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class History:
    """``turns`` ascending; ``next_before`` names the page before, ``None`` at the root."""

    turns: tuple[Turn, ...]
    next_before: str | None


class SessionManager:
    async def create(self, new: NewSession) -> SessionView: ...
    async def get(self, key: SessionKey, user_id: str | None = None) -> SessionView: ...
    async def list(
        self,
        owner: str | None = "",
        *,
        limit: int = 50,
        cursor: str | None = None,
        user_id: str | None = None,
        agent_id: str | None = None,
        window_id: str | None = None,
        status: SessionStatus | None = None,
        text: str | None = None,
    ) -> SessionViews: ...
    async def update(
        self, key: SessionKey, change: SessionChange, *, if_match: str | None = None, user_id: str | None = None
    ) -> SessionView: ...
    async def delete(self, key: SessionKey, user_id: str | None = None) -> None: ...
    async def history(
        self, key: SessionKey, *, limit: int = 50, before: str | None = None, user_id: str | None = None
    ) -> History: ...
    async def turns(
        self, key: SessionKey, *, limit: int = 50, cursor: str | None = None, user_id: str | None = None
    ) -> TurnPage: ...
    async def turn(self, key: SessionKey, turn_id: str, user_id: str | None = None) -> Turn: ...
