"""The sessions' records: make, find, list, change and delete them."""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from app.domain.erasure import Erased
from app.domain.errors import AgentPoolError, InvalidInput, SessionNotFound, SnapshotUnreadable
from app.domain.ids import SessionKey
from app.domain.session import Session, SessionChange, SessionQuery, SessionStatus, Unset
from app.domain.turn import CancelReason, JsonObject
from app.services.admission import NewSession
from app.services.session_base import SessionBase, SessionRef, SessionView, SessionViews, to_key

DELETE_PAGE = 50
"""Sessions that are deleted in one commit, which no other write can overtake."""


class SessionRecords(SessionBase):
    """The part of ``SessionManager`` that keeps the records."""

    async def create(self, new: NewSession | None = None, **fields: Any) -> SessionView:
        """Make a session as ``new`` says, or as ``fields`` of ``NewSession`` say.

        Raises:
            SessionExists, SessionLimit, AgentNotFound, UnknownModel
            InvalidInput: the template names a capability that the agent has not.
        """
        return self._view(await self._admission.create(new or NewSession(**fields)))

    async def create_many(self, news: Sequence[NewSession]) -> list[SessionView | AgentPoolError]:
        """Make sessions in one commit; return each, or why it was refused (as ``create`` raises)."""
        results = await self._admission.create_many(news)
        return [self._view(result) if isinstance(result, Session) else result for result in results]

    async def resume(self, new: NewSession | None = None, **fields: Any) -> tuple[SessionView, bool]:
        """Return the user's newest active session that has the agent and window, or a new one.

        The second value says whether it is new. Resuming is no activity.

        Raises:
            SessionLimit, AgentNotFound, UnknownModel
        """
        session, is_new = await self._admission.resume(new or NewSession(**fields))
        return self._view(session), is_new

    async def get(self, ref: SessionRef, user_id: str | None = None) -> SessionView:
        """Return a session, an expired one too.

        Raises:
            SessionNotFound
        """
        return self._view(await self._get(ref, user_id))

    async def exists(self, ref: SessionRef, user_id: str | None = None) -> bool:
        """Say whether there is such a session; an expired one is there until it is purged."""
        return await self._admission.find(to_key(ref), user_id) is not None

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
        ref: SessionRef,
        change: SessionChange,
        *,
        if_match: str | None = None,
        user_id: str | None = None,
    ) -> SessionView:
        """Change the record; a running turn goes on as it began, the next one counts it.

        ``if_match`` is the whole ETag that the record must have.

        Raises:
            SessionNotFound, PreconditionFailed, AgentNotFound, UnknownModel
            InvalidInput: the metadata would be too large, or the template names an unknown capability.
        """
        session = await self._get(ref, user_id)
        now = self._admission.clock.now_ms()
        chosen = (change.agent_id, change.provider, change.model, change.template)
        if not all(isinstance(value, Unset) for value in chosen):
            self._factory.check(change.apply(session, now, self._admission.life))
        return self._view(await self._store.update_session(session.key, change, now, expected_etag=if_match))

    async def update_metadata(
        self, ref: SessionRef, metadata: JsonObject, user_id: str | None = None
    ) -> SessionView:
        """Merge ``metadata`` into the session's (RFC 7396: ``None`` takes a key away).

        Raises:
            SessionNotFound
            InvalidInput: it would be too large.
        """
        return await self.update(ref, SessionChange(metadata=metadata), user_id=user_id)

    async def set_status(
        self, ref: SessionRef, status: SessionStatus, user_id: str | None = None
    ) -> SessionView:
        """Make the session active (which restarts its clock), idle or archived.

        Raises:
            SessionNotFound
            InvalidInput: sessions expire by the clock, not by hand.
        """
        if status is SessionStatus.EXPIRED:
            raise InvalidInput("status", "cannot be set to expired")
        return await self.update(ref, SessionChange(status=status), user_id=user_id)

    async def refresh(self, ref: SessionRef, user_id: str | None = None) -> SessionView:
        """Restart the expiry clock; an expired session is active again, an archived one stays archived.

        Raises:
            SessionNotFound
        """
        session = await self._get(ref, user_id)
        return self._view(await self._store.touch_session(session.key, self._admission.clock.now_ms()))

    async def delete(self, ref: SessionRef, user_id: str | None = None) -> None:
        """Delete a session and all that belongs to it; its running turn is cancelled.

        Turns that wait are refused with ``SessionNotFound``; none of them makes it anew. A
        session whose record is broken can be deleted, too.

        Raises:
            SessionNotFound
        """
        key = to_key(ref)
        try:
            await self._admission.get(key, user_id)
        except SnapshotUnreadable:
            if user_id is not None:  # whose it is cannot be told
                raise
        await self._ownership.cancel_holder(key, CancelReason.DELETED)
        self._cancel_turns(key)
        # No await between. Turns that come from now on wait behind this hold, and then find no session.
        async with self._pool.hold(key, front=True):
            if not await self._store.delete_session(key):
                raise SessionNotFound(session_id=key.session_id)

    async def delete_many(self, refs: Iterable[SessionRef], user_id: str | None = None) -> int:
        """Delete these sessions as ``delete`` does, a few at a time; return how many were there.

        With a ``user_id`` those of other users are as good as not there. Cancelled or failed, it has
        deleted some of them; it may be repeated.
        """
        distinct = list(dict.fromkeys(map(to_key, refs)))
        if user_id is not None:
            distinct = [key for key in distinct if await self._is_of(key, user_id)]
        deleted = 0
        for start in range(0, len(distinct), DELETE_PAGE):
            deleted += (await self._delete_page(distinct[start : start + DELETE_PAGE])).sessions
        return deleted

    async def delete_all(
        self, owner: str | None = "", *, user_id: str | None = None, agent_id: str | None = None
    ) -> int:
        """Delete every session of a user or an agent as ``delete_many`` does; return how many.

        ``owner`` ``None`` means those of all owners.

        Those that are made meanwhile go, too.
        """
        if user_id is None and agent_id is None:
            raise ValueError("name a user or an agent")
        deleted = 0
        while keys := await self._store.list_keys(
            owner, user_id=user_id, agent_id=agent_id, limit=DELETE_PAGE
        ):
            deleted += (await self._delete_page(keys)).sessions
        return deleted

    async def _is_of(self, key: SessionKey, user_id: str) -> bool:
        session = await self._store.find_session(key)
        return session is not None and session.user_id == user_id

    async def _delete_page(self, keys: Sequence[SessionKey]) -> Erased:
        for key in keys:  # before the first is waited for, so that their turns end side by side
            self._cancel_turns(key)
        if self._ownership.is_shared:
            reason = CancelReason.DELETED
            await asyncio.gather(*(self._ownership.cancel_holder(key, reason) for key in keys))
        async with AsyncExitStack() as held:
            # In one order for all: two deletes that share sessions must not wait for each other.
            for key in sorted(keys):
                self._cancel_turns(key)  # those that came meanwhile; later ones wait behind the hold
                await held.enter_async_context(self._pool.hold(key, front=True))
            return await self._store.delete_sessions(keys)

    def _cancel_turns(self, key: SessionKey) -> None:
        for flight in self._turns.of_session(key):
            flight.cancel(CancelReason.DELETED, keep_partial=False)
