"""Compaction: the model sums up a path, and the summary stands for it from then on.

Nothing is locked meanwhile: the note hangs on a committed turn, which never changes, and
counts for whatever head has that turn on its path.
"""

import asyncio
import logging

from app.background import TaskOwner
from app.domain.compaction import Note
from app.domain.errors import AgentPoolError, TurnNotFound, TurnTimeout
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.ports import AgentFactory, Clock, NewId, SessionStore

AT_ONCE = 4
"""Automatic compactions that run at the same time: they must not take the model from the turns."""
GROWTH = 2
"""How much longer than its last summary a context must be to be summed up automatically again."""

_log = logging.getLogger(__name__)


class Compactor:
    """Makes compaction notes, by itself once a context has ``after_tokens`` (0 = never)."""

    def __init__(
        self,
        store: SessionStore,
        factory: AgentFactory,
        clock: Clock,
        new_id: NewId,
        *,
        after_tokens: int = 0,
        timeout_s: float = 300.0,
    ) -> None:
        self._store = store
        self._factory = factory
        self._clock = clock
        self._new_id = new_id
        self._after_tokens = after_tokens
        self._timeout_s = timeout_s
        self._tasks = TaskOwner("compaction")
        self._running: dict[SessionKey, asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(AT_ONCE)

    @property
    def is_automatic(self) -> bool:
        return self._after_tokens > 0

    def consider(self, session: Session, tokens: int) -> None:
        """Begin to compact ``session`` if its context of about ``tokens`` is too long; do not wait for it."""
        if not self.is_automatic or tokens < self._after_tokens or session.key in self._running:
            return
        try:
            task = self._tasks.spawn(
                self._compact_quietly(session, tokens), f"compact {session.key.session_id}"
            )
        except RuntimeError:  # the server stops
            return
        self._running[session.key] = task
        task.add_done_callback(lambda _: self._running.pop(session.key))

    async def wait(self, key: SessionKey) -> None:
        """Return when no automatic compaction of the session is under way."""
        task = self._running.get(key)
        if task is not None:
            await asyncio.wait([task])

    async def compact(self, session: Session) -> Note:
        """Have the path to the session's head summed up, unless it is; return the note.

        Raises:
            TurnNotFound: there is no turn yet.
            ModelUnavailable, ModelRateLimited, ModelError, TurnTimeout: no summary; nothing has changed.
            SessionNotFound, SnapshotUnreadable, StoreUnavailable
        """
        if session.head is None:
            raise TurnNotFound("The session has no turn yet.", session_id=session.key.session_id)
        note = await self._store.get_note(session)
        return note if note is not None and note.turn_id == session.head else await self._make(session)

    async def close(self) -> None:
        """Stop what is being made; nothing of it is kept."""
        await self._tasks.close()

    async def _make(self, session: Session) -> Note:
        assert session.head is not None
        path = await self._store.load_path(session)
        try:
            async with asyncio.timeout(self._timeout_s):
                summary = await self._factory.summarise(session, path)
        except TimeoutError as error:
            raise TurnTimeout("The summary took longer than allowed.") from error
        note = Note(
            note_id=self._new_id(),
            turn_id=session.head,
            summary=summary.text,
            tokens_before=summary.tokens_before,
            tokens_after=summary.tokens_after,
            created_at=self._clock.now_ms(),
        )
        await self._store.add_note(session, note, summary.usage)
        return note

    async def _compact_quietly(self, session: Session, tokens: int) -> None:
        try:
            async with self._room:
                note = await self._store.get_note(session)
                # A summary that is long itself: to sum it up again at once would cost and not help.
                if note is None or tokens >= GROWTH * note.tokens_after:
                    await self._make(session)
        except AgentPoolError as error:
            _log.warning("session %r could not be compacted: %s", session.key.session_id, error)
