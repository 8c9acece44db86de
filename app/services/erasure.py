"""Erasing a user: what is stored of them, and what processes still have of it in memory.

All processes are told first: until it is done they make no session of the user's. Then sessions go as any
that are deleted, a page at a time: turns end, and none of those that wait makes one anew. Then what belongs
to no session goes, and then it is looked whether anything has come meanwhile. What was erased is not brought
back by a turn, since each needs the session that it began in.
"""

from collections.abc import Sequence

from app.domain.erasure import Erased, ErasureNotice, Receipt
from app.domain.errors import SessionBusy, SnapshotUnreadable
from app.domain.ids import SessionKey
from app.domain.session import SessionQuery
from app.services.records import DELETE_PAGE, SessionRecords
from app.services.session_base import owners_of

SPARE_PAGES = 100
"""Pages of sessions that may come while those go that there were, from a node that could not be told."""
BARRED_S = 10.0
"""How long a process believes that an erasure goes on of which it does not hear again."""


class SessionErasure(SessionRecords):
    """The part of ``SessionManager`` that erases users."""

    async def erase_user(self, owner: str, user_id: str, *, with_unowned: bool = False) -> Receipt:
        """Remove all that is stored of a user, and return a receipt for it. Repeating is harmless.

        Of an ``owner`` who is the user everything goes, else their sessions with this user id. Totals of
        all users stay. While it goes on, new sessions of theirs are refused. Cancelled or failed, it has
        erased a part; it may be repeated. No receipt is kept here: it would keep the user's name.

        ``with_unowned``: what was stored under this user id while nobody needed a credential goes, too.
        That is an operator's to say: whoever was called so then may have been somebody else.

        Raises:
            SessionBusy: the user makes sessions faster than they are removed.
        """
        erased = Erased()
        for one in owners_of(owner, with_unowned):
            erased += await self._erase(one, user_id)
        return Receipt(
            receipt_id=self._admission.new_id(),
            user_id=user_id,
            erased_at=self._admission.clock.now_ms(),
            erased=erased,
        )

    async def forget_here(self, keys: Sequence[SessionKey], notice: ErasureNotice) -> None:
        """End the turns of these sessions, and drop what is in memory of those that are gone."""
        self._heed(notice)
        for key in keys:
            self._cancel_turns(key)
        gone = {key for key in keys if await self._is_gone(key)}
        for key in gone:
            self._pool.evict(key)
        self._turns.forget(gone)

    async def _erase(self, owner: str, user_id: str) -> Erased:
        spent = await self._turns.quota.measure((owner, user_id))
        notice = ErasureNotice(owner=owner, user_id=user_id, lasts_s=BARRED_S, spent=spent)
        try:
            erased = await self._erase_all(notice)
        finally:
            self._admission.bar(notice.user, 0)
        self._heed(notice.done())
        await self._ownership.forget_elsewhere((), notice.done())
        return erased

    async def _erase_all(self, notice: ErasureNotice) -> Erased:
        owner, user_id = notice.user
        erased, pages_left = Erased(), await self._count_pages(owner, user_id) + SPARE_PAGES
        # Before anything goes: whatever becomes of this, nobody begins the day anew by it.
        await self._tell((), notice)
        while True:
            keys = await self._list_page(owner, user_id)
            if not keys:
                erased += await self._store.forget_user(owner, user_id)
                if not (keys := await self._list_page(owner, user_id)):
                    return erased
            if not pages_left:
                raise SessionBusy("The user goes on making sessions.", retry_after_s=1)
            pages_left -= 1
            erased += await self._erase_page(keys, notice)

    async def _erase_page(self, keys: Sequence[SessionKey], notice: ErasureNotice) -> Erased:
        # Before, too: a turn that waits on another node would find no session and might make one.
        await self._tell(keys, notice)
        erased = await self._delete_page(keys)
        await self.forget_here(keys, notice)
        await self._ownership.forget_elsewhere(keys, notice)
        return erased

    async def _tell(self, keys: Sequence[SessionKey], notice: ErasureNotice) -> None:
        self._heed(notice)
        await self._ownership.forget_elsewhere(keys, notice)

    def _heed(self, notice: ErasureNotice) -> None:
        self._admission.bar(notice.user, notice.lasts_s)
        self._turns.quota.note_erasure(notice.user, notice.spent)

    async def _is_gone(self, key: SessionKey) -> bool:
        try:
            return await self._store.find_session(key) is None
        except SnapshotUnreadable:  # it is there
            return False

    async def _list_page(self, owner: str, user_id: str) -> tuple[SessionKey, ...]:
        only = None if owner == user_id else user_id
        return await self._store.list_keys(owner, user_id=only, limit=DELETE_PAGE)

    async def _count_pages(self, owner: str, user_id: str) -> int:
        only = None if owner == user_id else user_id
        query = SessionQuery(owner=owner, now=self._admission.clock.now_ms(), limit=1, user_id=only)
        return ((await self._store.list_sessions(query)).total or 0) // DELETE_PAGE
