"""Turns in flight: their logs, who watches them, and how they are cancelled.

A turn belongs to the server. Its log is a list of events; a watcher is a
position in it and a future that the plain ``append`` wakes, so a token costs
neither a lock nor a task, and a watcher that is behind costs nothing at all.
"""

import asyncio

from app.domain.events import TerminalEvent, TurnCancelled, TurnEvent, TurnFailed, TurnFinished


class TurnLog:
    """The events of one turn; that at index ``i`` has the sequence number ``i + 1``.

    ``frames`` is where faces keep what they encoded, one list per face parallel
    to ``events``, so that watchers share it.
    """

    __slots__ = ("_waiters", "events", "frames", "size_bytes", "turn_id")

    def __init__(self, turn_id: str) -> None:
        self.turn_id = turn_id
        self.events: list[TurnEvent] = []
        self.frames: dict[str, list[bytes]] = {}
        self.size_bytes = 0
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def is_closed(self) -> bool:
        """Whether the terminal event is in."""
        return bool(self.events) and isinstance(self.events[-1], TerminalEvent)

    @property
    def terminal(self) -> TurnFinished | TurnFailed | TurnCancelled | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, TerminalEvent) else None

    def append(self, event: TurnEvent) -> None:
        """Add an event and wake everyone who waits for it."""
        self.events.append(event)
        self.wake()

    def wake(self) -> None:
        """Let every watcher look again."""
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def wait_beyond(self, count: int) -> None:
        """Return once there are more than ``count`` events, or none will come.

        May be cancelled at any time; the log is not changed by that.
        """
        while len(self.events) <= count and not self.is_closed:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
