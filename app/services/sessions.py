"""``SessionManager``: everything that can be done with sessions but talking to them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.domain.ids import SessionKey
from app.domain.session import Session, SessionStatus
from app.domain.stats import SessionStats
from app.services.admission import NewSession
from app.services.branches import SessionBranches
from app.services.erasure import SessionErasure
from app.services.export import SessionExport
from app.services.readings import History, SessionReadings
from app.services.session_base import SessionRef, SessionView, SessionViews
from app.services.state import SessionStates

PURGE_BATCH = 500
LIST_PAGE = 200

__all__ = ["History", "NewSession", "SessionManager", "SessionRef", "SessionView", "SessionViews"]


class SessionManager(SessionErasure, SessionExport, SessionReadings, SessionBranches, SessionStates):
    """The sessions of one store.

    A session is named by its ``SessionKey``, or by its id alone where there is but one owner.
    Where a ``user_id`` is given, a session of another user is as good as none.
    """

    async def status(self, ref: SessionRef, user_id: str | None = None) -> SessionStatus:
        """Return where the session is in its life now.

        Raises:
            SessionNotFound
        """
        return (await self.get(ref, user_id)).status

    @asynccontextmanager
    async def lock(self, ref: SessionRef, user_id: str | None = None) -> AsyncIterator[Session]:
        """Keep every turn, and every other lock, out of the session; yield its record as of then.

        Waits in the queue of its turns. A live agent that is idle is dropped, so that whatever is
        done inside counts from the next turn on. A turn of this session must not be awaited inside.

        Raises:
            SessionNotFound, TurnQueueFull, Draining
            LeaseReentered: called from inside a turn or another lock of the session.
        """
        session = await self._get(ref, user_id)
        async with self._holds.hold(session.key):
            yield await self._admission.get(session.key, user_id)

    async def active_count(self, user_id: str | None = None, owner: str = "") -> int:
        """Return how many sessions of the user are active; of all users in O(1), late by a sweep at most."""
        if user_id is None:
            return (await self.stats()).active
        return len(await self.all_active(user_id, owner))

    async def all_active(self, user_id: str | None = None, owner: str | None = "") -> list[SessionView]:
        """Return every active session, of all users or of one, newest activity first."""
        views: list[SessionView] = []
        cursor = None
        while True:
            page = await self.list(
                owner, user_id=user_id, status=SessionStatus.ACTIVE, limit=LIST_PAGE, cursor=cursor
            )
            views += page.views
            if (cursor := page.next_cursor) is None:
                return views

    async def stats(self) -> SessionStats:
        """Return the store's counters, at a cost that does not depend on how many sessions there are."""
        return await self._store.get_session_stats()

    async def cleanup(self) -> tuple[int, int]:
        """Expire and purge what is due; return how many sessions that were.

        A session with a turn that runs is left alone. The live agent of one that is purged goes, too.
        """
        expired = removed = 0
        while True:
            now = self._admission.clock.now_ms()
            newly, purged = await self._store.expire_and_purge(now, PURGE_BATCH)
            expired, removed = expired + newly, removed + purged
            if purged < PURGE_BATCH:
                break
        if removed:
            await self._evict_orphans()
        return expired, removed

    async def _evict_orphans(self) -> None:
        """Drop the idle agents of sessions that are gone."""
        for live in self._pool.live_sessions():
            key = SessionKey(live.owner, live.session_id)
            if await self._store.find_session(key) is None:
                self._pool.evict(key)
