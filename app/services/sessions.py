"""Sessions: make, find, list, change and delete them, and read what was said."""

from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from app.domain.errors import (
    AgentNotFound,
    AgentPoolError,
    SessionNotFound,
    SnapshotUnreadable,
    UnknownModel,
)
from app.domain.ids import SessionKey
from app.domain.session import Session, SessionChange, SessionQuery, SessionStatus, Unset
from app.domain.stats import UserUsage
from app.domain.turn import MESSAGES_PER_TURN, CancelReason, Turn, TurnPage
from app.pool.manager import AgentManager
from app.ports import AgentFactory, SessionStore
from app.services.admission import Admission, NewSession
from app.services.turns import Turns

DELETE_PAGE = 50
"""Sessions that are deleted in one commit, which no other write can overtake."""

USAGE_DAYS = 366
"""Days of usage that one answer lists."""

__all__ = ["History", "NewSession", "SessionManager", "SessionView", "SessionViews"]


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


@dataclass(frozen=True, slots=True)
class SessionViews:
    """A page; ``total`` is ``None`` when counting would cost too much."""

    views: tuple[SessionView, ...]
    total: int | None
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class History:
    """``turns`` ascending; ``next_before`` names the page before, ``None`` at the root."""

    turns: tuple[Turn, ...]
    next_before: str | None


class SessionManager:
    """The sessions' records. A ``user_id`` that is not the session's is as good as no session."""

    def __init__(
        self,
        store: SessionStore,
        factory: AgentFactory,
        pool: AgentManager,
        turns: Turns,
        admission: Admission,
    ) -> None:
        self._store = store
        self._factory = factory
        self._pool = pool
        self._turns = turns
        self._admission = admission

    async def create(self, new: NewSession) -> SessionView:
        """Make a session.

        Raises:
            SessionExists, SessionLimit, AgentNotFound, UnknownModel
        """
        return self._view(await self._admission.create(new))

    async def create_many(self, news: Sequence[NewSession]) -> list[SessionView | AgentPoolError]:
        """Make sessions in one commit; return each, or why it was refused (as ``create`` raises)."""
        results = await self._admission.create_many(news)
        return [self._view(result) if isinstance(result, Session) else result for result in results]

    async def resume(self, new: NewSession) -> tuple[SessionView, bool]:
        """Return the user's newest active session that has the agent and window, or a new one.

        The second value says whether it is new. Resuming is no activity.

        Raises:
            AgentNotFound, UnknownModel
        """
        session, is_new = await self._admission.resume(new)
        return self._view(session), is_new

    async def get(self, key: SessionKey, user_id: str | None = None) -> SessionView:
        """Return a session, an expired one too.

        Raises:
            SessionNotFound
        """
        return self._view(await self._admission.get(key, user_id))

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
    ) -> SessionViews:
        """Return a page of sessions, newest activity first; ``owner`` ``None`` means all owners.

        Raises:
            InvalidInput: ``cursor`` did not come from a page of this list.
        """
        query = SessionQuery(
            owner=owner,
            now=self._admission.clock.now_ms(),
            limit=limit,
            cursor=cursor,
            user_id=user_id,
            agent_id=agent_id,
            window_id=window_id,
            status=status,
            text=text,
        )
        page = await self._store.list_sessions(query)
        return SessionViews(tuple(map(self._view, page.sessions)), page.total, page.next_cursor)

    async def update(
        self,
        key: SessionKey,
        change: SessionChange,
        *,
        if_match: str | None = None,
        user_id: str | None = None,
    ) -> SessionView:
        """Change the record; a running turn goes on as it began, the next one counts it.

        ``if_match`` is the whole ETag that the record must have.

        Raises:
            SessionNotFound, PreconditionFailed, AgentNotFound, UnknownModel
        """
        session = await self._admission.get(key, user_id)
        if not all(isinstance(v, Unset) for v in (change.agent_id, change.provider, change.model)):
            now = self._admission.clock.now_ms()
            self._factory.check(change.apply(session, now, self._admission.life))
        now = self._admission.clock.now_ms()
        return self._view(await self._store.update_session(key, change, now, expected_etag=if_match))

    async def refresh(self, key: SessionKey, user_id: str | None = None) -> SessionView:
        """Restart the expiry clock; an expired session is active again, an archived one stays archived.

        Raises:
            SessionNotFound
        """
        await self._admission.get(key, user_id)
        return self._view(await self._store.touch_session(key, self._admission.clock.now_ms()))

    async def delete(self, key: SessionKey, user_id: str | None = None) -> None:
        """Delete a session and all that belongs to it; its running turn is cancelled.

        Turns that wait are refused with ``SessionNotFound``; none of them makes it anew. A
        session whose record is broken can be deleted, too.

        Raises:
            SessionNotFound
        """
        try:
            await self._admission.get(key, user_id)
        except SnapshotUnreadable:
            if user_id is not None:  # whose it is cannot be told
                raise
        self._cancel_turns(key)
        # Turns that come from now on wait behind this hold, and then find no session.
        async with self._pool.hold(key, front=True):
            if not await self._store.delete_session(key):
                raise SessionNotFound(session_id=key.session_id)

    async def delete_many(self, keys: Iterable[SessionKey]) -> int:
        """Delete these sessions as ``delete`` does, a few at a time; return how many were there.

        Cancelled or failed, it has deleted some of them; it may be repeated.
        """
        distinct = list(dict.fromkeys(keys))
        deleted = 0
        for start in range(0, len(distinct), DELETE_PAGE):
            deleted += await self._delete_page(distinct[start : start + DELETE_PAGE])
        return deleted

    async def delete_all(
        self, owner: str = "", *, user_id: str | None = None, agent_id: str | None = None
    ) -> int:
        """Delete every session of a user or an agent as ``delete_many`` does; return how many.

        Those that are made meanwhile go, too.
        """
        if user_id is None and agent_id is None:
            raise ValueError("name a user or an agent")
        deleted = 0
        while keys := await self._store.list_keys(
            owner, user_id=user_id, agent_id=agent_id, limit=DELETE_PAGE
        ):
            deleted += await self._delete_page(keys)
        return deleted

    async def _delete_page(self, keys: Sequence[SessionKey]) -> int:
        for key in keys:  # before the first is waited for, so that their turns end side by side
            self._cancel_turns(key)
        async with AsyncExitStack() as held:
            # In one order for all: two deletes that share sessions must not wait for each other.
            for key in sorted(keys):
                self._cancel_turns(key)  # those that came meanwhile; later ones wait behind the hold
                await held.enter_async_context(self._pool.hold(key, front=True))
            return await self._store.delete_sessions(keys)

    def _cancel_turns(self, key: SessionKey) -> None:
        for flight in self._turns.of_session(key):
            flight.cancel(CancelReason.DELETED, keep_partial=False)

    async def history(
        self, key: SessionKey, *, limit: int = 50, before: str | None = None, user_id: str | None = None
    ) -> History:
        """Return the newest page of the current branch, of at most ``limit`` messages but whole turns.

        Raises:
            SessionNotFound
            TurnNotFound: ``before`` is not on the current branch.
        """
        session = await self._admission.get(key, user_id)
        turns = await self._store.list_branch(session, max(1, limit // MESSAGES_PER_TURN), before)
        has_more = bool(turns) and turns[0].parent is not None
        return History(turns, turns[0].turn_id if has_more else None)

    async def turns(
        self, key: SessionKey, *, limit: int = 50, cursor: str | None = None, user_id: str | None = None
    ) -> TurnPage:
        """Return a page of all turns, newest first; failed, cancelled and running ones too.

        Raises:
            SessionNotFound
            InvalidInput: ``cursor`` did not come from a page of this list.
        """
        session = await self._admission.get(key, user_id)
        return await self._store.list_turns(session, limit, cursor)

    async def turn(self, key: SessionKey, turn_id: str, user_id: str | None = None) -> Turn:
        """Return one turn.

        Raises:
            SessionNotFound, TurnNotFound
        """
        session = await self._admission.get(key, user_id)
        return await self._store.get_turn(session, turn_id)

    async def usage(self, user_id: str, owner: str = "") -> UserUsage:
        """Return what the user's turns took, in total and on each of the newest ``USAGE_DAYS`` days."""
        return await self._store.get_usage(owner, user_id, USAGE_DAYS)

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
