"""Start records that wait, since most turns end before theirs is needed.

It is needed by those who look at running turns, and by the next process if this one
dies; all else that it says is in the turn's end, too. So it waits for a moment here and
goes to the writer when that is over, or when somebody asks; or never, if its turn is
stored before. Always true:

* of a session at most one waits;
* before anything else that concerns its session is queued, it is: then the file says at
  each moment what it would say if none ever waited;
* only its own turn's end may overtake it, and written behind that it changes nothing.
"""

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from app.domain.errors import StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.domain.turn import Turn
from app.stores.codec import to_turn_body
from app.stores.sqlite import writes
from app.stores.sqlite.writer import Writer

START_DELAY_S = 0.1
PATIENCE_S = 1.0
"""How long a reader waits for one to be written; without it, it sees what it would see after a crash."""


class _Start(NamedTuple):
    session: Session
    turn: Turn
    due: float


class Starts:
    """The start records that are not written yet. Every method is called on the event loop's thread."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[SessionKey, _Start] = {}  # the first is the first due
        self._unwritten: dict[SessionKey, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def defer(self, session: Session, turn: Turn) -> None:
        """Let the start record of ``turn`` wait; never fails, and nobody hears if writing it does."""
        self.hand_over(session.key)
        due = self._loop.time() + START_DELAY_S
        self._waiting[session.key] = _Start(session, turn, due)
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._hand_over_due)

    def hand_over(self, key: SessionKey, *, unless: str | None = None) -> None:
        """Queue what waits of this session, before anything that is queued after this call.

        Not that of the turn ``unless``, which is about to end.
        """
        start = self._waiting.get(key)
        if start is None or start.turn.turn_id == unless:
            return
        del self._waiting[key]
        body = to_turn_body(start.turn)
        work = partial(writes.start_turn, session=start.session, turn=start.turn, body=body)
        try:
            written = self._unwritten[key] = self._writer.post(work, "start_turn")
        except StoreUnavailable:
            return  # the writer has died, as the log says: this turn leaves no trace
        written.add_done_callback(partial(self._forget, key))

    def hand_over_all(self) -> None:
        for key in list(self._waiting):
            self.hand_over(key)

    def drop(self, key: SessionKey, turn_id: str) -> None:
        """Forget the start record of a turn whose end is stored."""
        start = self._waiting.get(key)
        if start is not None and start.turn.turn_id == turn_id:
            del self._waiting[key]

    def has(self, key: SessionKey) -> bool:
        """Say whether one of this session is not written yet."""
        return key in self._waiting or key in self._unwritten

    async def wait_written(self, key: SessionKey) -> None:
        """Return when readers see what was deferred of this session; what cannot be written is not seen."""
        if self.has(key):
            self.hand_over(key)
            await self._wait(filter(None, [self._unwritten.get(key)]))

    async def wait_all_written(self) -> None:
        """As ``wait_written``, of all sessions."""
        self.hand_over_all()
        await self._wait(self._unwritten.values())

    def close(self) -> None:
        """Hand over all; nothing is deferred after this."""
        self.hand_over_all()
        if self._timer is not None:
            self._timer.cancel()

    async def _wait(self, futures: Iterable["asyncio.Future[None]"]) -> None:
        if futures := list(futures):
            await asyncio.wait(futures, timeout=PATIENCE_S)

    def _hand_over_due(self) -> None:
        self._timer, now = None, self._loop.time()
        for key, start in list(self._waiting.items()):
            if start.due > now:
                self._timer = self._loop.call_at(start.due, self._hand_over_due)
                break
            self.hand_over(key)

    def _forget(self, key: SessionKey, written: "asyncio.Future[None]") -> None:
        if self._unwritten.get(key) is written:  # else a later one is under way
            del self._unwritten[key]
