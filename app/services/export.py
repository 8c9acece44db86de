"""Everything that is stored of a user, piece by piece, for them to take away."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from app.domain.checkpoint import Checkpoint
from app.domain.compaction import Note
from app.domain.errors import RateLimited, SnapshotUnreadable
from app.domain.ids import SessionKey
from app.domain.journal import LoggedFact, Position, position_of
from app.domain.quota import Quota, UserKey
from app.domain.session import Session
from app.domain.state import SharedState, StateScope
from app.domain.stats import UserUsage
from app.domain.turn import Turn
from app.services.session_base import SessionBase, SessionView, owners_of

PAGE = 10
"""Turns, checkpoints or events that are in memory at once, for as long as the reader is slow to take them."""
EXPORTS = 4
"""So many at a time: each keeps the store busy as fast as it is read."""
RETRY_S = 5.0
EVERY_DAY = 10**6


@dataclass(frozen=True, slots=True)
class OfSession:
    """A piece of the session that came before it. A checkpoint's data comes with it."""

    session_id: str
    piece: Turn | Checkpoint | Note | LoggedFact


@dataclass(frozen=True, slots=True)
class UserState:
    app_name: str
    shared: SharedState


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Some of a session, or the user's state in an application, cannot be read."""

    session_id: str | None = None
    app_name: str | None = None


Exported = SessionView | OfSession | UserState | UserUsage | Unreadable


class SessionExport(SessionBase):
    """The part of ``SessionManager`` that hands out all that belongs to a user."""

    @asynccontextmanager
    async def export_user(
        self, owner: str, user_id: str, *, with_unowned: bool = False
    ) -> AsyncIterator[AsyncIterator[Exported]]:
        """Yield what is stored of a user: per session its record and then its pieces, states, usage.

        Of an ``owner`` who is the user everything, else their sessions with this user id: those that
        there are now, each as it is when it is reached; one that is deleted meanwhile ends there. The
        ids are read at once, some 200 bytes each, all else a page at a time. Turns are newest first.
        ``with_unowned``: afterwards also what ``erase_user`` would remove with it.

        Raises, also while it is read:
            StoreUnavailable
            RateLimited: one of this user, or ``EXPORTS`` of others, are under way; until they are left.
        """
        with self._place((owner, user_id)):
            owners = owners_of(owner, with_unowned)
            # Now: a store that does not answer is told of before the first piece.
            keys = {one: await self._list_keys(one, user_id) for one in owners}
            yield self._export(keys, user_id)

    @contextmanager
    def _place(self, user: UserKey) -> Iterator[None]:
        if user in self._exports:
            quota = Quota(1, 0, RETRY_S, None, "exports")
            raise RateLimited("An export of this user is under way.", quota=quota)
        if len(self._exports) >= EXPORTS:
            quota = Quota(EXPORTS, 0, RETRY_S, None, "exports")
            raise RateLimited("As many exports as allowed are under way.", quota=quota)
        self._exports.add(user)
        try:
            yield
        finally:
            self._exports.discard(user)

    def now_ms(self) -> int:
        """Return the time, in milliseconds."""
        return self._admission.clock.now_ms()

    async def _list_keys(self, owner: str, user_id: str) -> Sequence[SessionKey]:
        only = None if owner == user_id else user_id
        return await self._store.list_keys(owner, user_id=only, limit=2**31)

    async def _export(
        self, keys_by_owner: dict[str, Sequence[SessionKey]], user_id: str
    ) -> AsyncIterator[Exported]:
        for owner, keys in keys_by_owner.items():
            for key in sorted(keys):
                async for piece in self._export_session(key):
                    yield piece
            for scope in await self._store.list_scopes(owner, user_id):
                yield await self._read_state(scope)
            yield await self._store.get_usage(owner, user_id, EVERY_DAY)

    async def _export_session(self, key: SessionKey) -> AsyncIterator[Exported]:
        try:
            session = await self._store.find_session(key)
        except SnapshotUnreadable:
            yield Unreadable(session_id=key.session_id)
            return
        if session is None:
            return
        yield self._view(session)
        for pieces in (self._turns_of, self._checkpoints_of, self._notes_of, self._facts_of):
            try:
                async for piece in pieces(session):
                    yield OfSession(key.session_id, piece)
            except SnapshotUnreadable:
                yield Unreadable(session_id=key.session_id)

    async def _turns_of(self, session: Session) -> AsyncIterator[Turn]:
        cursor, is_last = None, False
        while not is_last:
            page = await self._store.list_turns(session, PAGE, cursor)
            for turn in page.turns:
                yield turn
            cursor, is_last = page.next_cursor, page.next_cursor is None

    async def _checkpoints_of(self, session: Session) -> AsyncIterator[Checkpoint]:
        """Yield the checkpoints.

        Raises:
            SnapshotUnreadable: there are more than could be read, as it says at the end.
        """
        cursor, is_last, listed, least = None, False, 0, None
        while not is_last:
            page = await self._store.list_checkpoints(session, PAGE, cursor)
            for checkpoint in page.checkpoints:
                yield checkpoint
            listed += len(page.checkpoints)
            # Some may come and go meanwhile.
            least = page.total if least is None else min(least, page.total)
            cursor, is_last = page.next_cursor, page.next_cursor is None
        if least is not None and listed < least:
            raise SnapshotUnreadable(session_id=session.key.session_id)

    async def _notes_of(self, session: Session) -> AsyncIterator[Note]:
        for note in await self._store.list_notes(session):
            yield note

    async def _facts_of(self, session: Session) -> AsyncIterator[LoggedFact]:
        position: Position | None = None
        while entries := await self._store.list_entries(session, position, PAGE, newest_first=False):
            for entry in entries:
                if isinstance(entry, LoggedFact):
                    yield entry
            position = position_of(entries[-1])

    async def _read_state(self, scope: StateScope) -> UserState | Unreadable:
        try:
            return UserState(scope.app_name, await self._store.get_shared(scope))
        except SnapshotUnreadable:
            return Unreadable(app_name=scope.app_name)
