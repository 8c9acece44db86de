"""Erasing a user: what is stored of them, and what processes still have of it in memory.

Sessions go as any that are deleted, a page at a time: turns end, and none of those that wait makes one anew.
Then what belongs to no session goes, and then it is looked whether anything has come meanwhile. What was
erased is not brought back by a turn, since each needs the session that it began in.
"""

from collections.abc import Sequence

from app.domain.erasure import Erased, Receipt
from app.domain.errors import SessionBusy
from app.domain.ids import SessionKey
from app.domain.session import SessionQuery
from app.services.records import DELETE_PAGE, SessionRecords

SPARE_PAGES = 100
"""Pages of sessions that may come while those go that there were: a user who makes more has to stop first."""


class SessionErasure(SessionRecords):
    """The part of ``SessionManager`` that erases users."""

    async def erase_user(self, owner: str, user_id: str) -> Receipt:
        """Remove all that is stored of a user, and return a receipt for it. Repeating is harmless.

        Of an ``owner`` who is the user everything goes, else their sessions with this user id. Totals of
        all users stay. Cancelled or failed, it has erased a part; it may be repeated. No receipt is kept
        here: it would keep the user's name.

        Raises:
            SessionBusy: the user makes sessions faster than they are removed.
        """
        spent = await self._turns.quota.learn((owner, user_id))
        erased, pages_left = Erased(), await self._count_pages(owner, user_id) + SPARE_PAGES
        while True:
            keys = await self._list_page(owner, user_id)
            if not keys:
                erased += await self._store.forget_user(owner, user_id)
                if not (keys := await self._list_page(owner, user_id)):
                    break
            if not pages_left:
                raise SessionBusy("The user goes on making sessions.", retry_after_s=1)
            pages_left -= 1
            erased += await self._erase_page(keys)
        self._turns.quota.note_erasure((owner, user_id), spent)
        return Receipt(
            receipt_id=self._admission.new_id(),
            user_id=user_id,
            erased_at=self._admission.clock.now_ms(),
            erased=erased,
        )

    async def forget_here(self, keys: Sequence[SessionKey]) -> None:
        """End the turns of these sessions, and drop what is in memory of those that are gone."""
        for key in keys:
            self._cancel_turns(key)
        gone = {key for key in keys if await self._store.find_session(key) is None}
        for key in gone:
            self._pool.evict(key)
        self._turns.forget(gone)

    async def _erase_page(self, keys: Sequence[SessionKey]) -> Erased:
        # Before, too: a turn that waits on another node would find no session and might make one.
        await self._ownership.forget_elsewhere(keys)
        erased = await self._delete_page(keys)
        await self.forget_here(keys)
        await self._ownership.forget_elsewhere(keys)
        return erased

    async def _list_page(self, owner: str, user_id: str) -> tuple[SessionKey, ...]:
        only = None if owner == user_id else user_id
        return await self._store.list_keys(owner, user_id=only, limit=DELETE_PAGE)

    async def _count_pages(self, owner: str, user_id: str) -> int:
        only = None if owner == user_id else user_id
        query = SessionQuery(owner=owner, now=self._admission.clock.now_ms(), limit=1, user_id=only)
        return ((await self._store.list_sessions(query)).total or 0) // DELETE_PAGE
