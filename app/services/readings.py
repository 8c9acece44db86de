"""What was said and done in a session: its history, its turns, its events; and what a user's turns took."""

from dataclasses import dataclass

from app.domain.errors import InvalidInput
from app.domain.session import Session
from app.domain.stats import UserUsage
from app.domain.turn import MESSAGES_PER_TURN, Turn, TurnPage
from app.services.session_base import SessionBase, SessionRef
from app.services.story import Asked, Key, StoryEvent, find_key, tell_backwards, tell_forwards

USAGE_DAYS = 366
"""Days of usage that one answer lists."""


@dataclass(frozen=True, slots=True)
class History:
    """``turns`` ascending; ``next_before`` names the page before, ``None`` at the root."""

    turns: tuple[Turn, ...]
    next_before: str | None


class SessionReadings(SessionBase):
    """The part of ``SessionManager`` that only reads."""

    async def history(
        self, ref: SessionRef, *, limit: int = 50, before: str | None = None, user_id: str | None = None
    ) -> History:
        """Return the newest page of the current branch, of at most ``limit`` messages but whole turns.

        Raises:
            SessionNotFound
            TurnNotFound: ``before`` is not on the current branch.
        """
        session = await self._get(ref, user_id)
        turns = await self._store.list_branch(session, max(1, limit // MESSAGES_PER_TURN), before)
        has_more = bool(turns) and turns[0].parent is not None
        return History(turns, turns[0].turn_id if has_more else None)

    async def turns(
        self, ref: SessionRef, *, limit: int = 50, cursor: str | None = None, user_id: str | None = None
    ) -> TurnPage:
        """Return a page of all turns, newest first; failed, cancelled and running ones too.

        Raises:
            SessionNotFound
            InvalidInput: ``cursor`` did not come from a page of this list.
        """
        session = await self._get(ref, user_id)
        return await self._store.list_turns(session, limit, cursor)

    async def turn(self, ref: SessionRef, turn_id: str, user_id: str | None = None) -> Turn:
        """Return one turn.

        Raises:
            SessionNotFound, TurnNotFound
        """
        session = await self._get(ref, user_id)
        return await self._store.get_turn(session, turn_id)

    async def usage(self, user_id: str, owner: str = "") -> UserUsage:
        """Return what the user's turns took, in total and on each of the newest ``USAGE_DAYS`` days."""
        return await self._store.get_usage(owner, user_id, USAGE_DAYS)

    async def events(
        self,
        ref: SessionRef,
        *,
        limit: int = 50,
        after: str | None = None,
        before: str | None = None,
        since: int | None = None,
        kinds: frozenset[type] | None = None,
        user_id: str | None = None,
    ) -> tuple[StoryEvent, ...]:
        """Return events of all turns, failed ones too, and changes of state and head, ascending.

        The newest ``limit`` of them; with ``after`` an event the next ones, with ``before`` the ones
        before it. ``since`` (milliseconds) and ``kinds`` (classes of events) leave others out.
        Events beyond ``SESSION_EVENT_LIMIT`` are not told any more.

        Raises:
            SessionNotFound
            InvalidInput: both ``after`` and ``before``, or one that is no event's id.
            TurnNotFound: the event is of no turn of this session.
        """
        if after is not None and before is not None:
            raise InvalidInput("after", "and before cannot be combined")
        session = await self._get(ref, user_id)
        asked = Asked(since, kinds, await self._floor(session))
        if after is not None:
            key = await find_key(self._store, session, after, "after")
            told = await tell_forwards(self._store, session, asked, limit, key)
        elif before is not None:
            key = await find_key(self._store, session, before, "before")
            told = await tell_backwards(self._store, session, asked, limit, key)
        else:
            told = await tell_backwards(self._store, session, asked, limit)
        return tuple(event for _, event in told)

    async def _floor(self, session: Session) -> Key | None:
        """Return the place of the oldest event that is told, ``None`` if all are."""
        limit = self._admission.life.event_limit
        if not limit:
            return None
        told = await tell_backwards(self._store, session, Asked(), limit)
        return told[0][0] if len(told) == limit else None
