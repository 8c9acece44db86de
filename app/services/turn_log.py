"""The log of one turn, and those who watch it.

A watcher is a position in the list of events and, while there is nothing behind it, a
future that the plain ``append`` resolves, or a plain call that takes the event at once: a
token costs neither a lock nor a task, and a watcher that is behind costs nothing at all.
"""

import asyncio
from collections.abc import Callable
from itertools import chain

from app.domain.events import (
    MessageCompleted,
    ReasoningDelta,
    TerminalEvent,
    TextDelta,
    ToolCalled,
    ToolReturned,
    TurnEvent,
)

_EVENT_BYTES = 400  # measured: an event object, its text and its encoded frame, short tokens


class TurnLog:
    """The events of one turn; that at index ``i`` has the sequence number ``i + 1``.

    ``frames`` is where faces keep what they encoded, one list per face parallel
    to ``events``, so that watchers share it; ``None`` stands for what nobody needed yet.
    """

    __slots__ = ("_closed", "_closing", "_waiters", "_watches", "events", "frames", "turn_id")

    def __init__(self, turn_id: str) -> None:
        self.turn_id = turn_id
        self.events: list[TurnEvent] = []
        self.frames: dict[str, list[bytes | None]] = {}
        # Not sets: woken in the order in which they came, a run can be repeated.
        self._waiters: dict[asyncio.Future[bool], None] = {}
        self._closing: dict[asyncio.Future[bool], None] = {}
        self._watches: dict[Watch, None] = {}
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """Whether no event will come any more."""
        return self._closed

    @property
    def terminal(self) -> TerminalEvent | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, TerminalEvent) else None

    @property
    def estimated_bytes(self) -> int:
        text = next((len(e.text) for e in reversed(self.events[-2:]) if isinstance(e, MessageCompleted)), 0)
        return _EVENT_BYTES * len(self.events) + 4 * text

    @property
    def estimated_tokens(self) -> int:
        """About how many tokens the model's words are: one for every 4 bytes, as agents estimate."""
        texts = (e.text for e in self.events if isinstance(e, TextDelta | ReasoningDelta))
        calls = (e.name + str(e.arguments) for e in self.events if isinstance(e, ToolCalled))
        return -(-sum(len(text.encode("utf-8", "replace")) for text in chain(texts, calls)) // 4)

    def tool_seqs(self) -> tuple[int, ...]:
        """Return the sequence numbers of the tool events."""
        return tuple(n for n, e in enumerate(self.events, 1) if isinstance(e, ToolCalled | ToolReturned))

    def append(self, event: TurnEvent) -> None:
        """Add an event and tell everyone who waits for it; nothing is added to a closed log."""
        if self._closed:
            return
        self.events.append(event)
        self._tell()

    def close(self, terminal: TerminalEvent | None = None) -> None:
        """Add the terminal event, if any, and let nothing follow."""
        if self._closed:
            return
        if terminal is not None:
            self.events.append(terminal)
        self._closed = True
        self._tell()
        _wake(self._closing)

    def _tell(self) -> None:
        for watch in self._watches:
            watch.tell()
        if self._waiters:
            _wake(self._waiters)

    def watch(self, limit_s: float, take: "Take | None" = None) -> "Watch":
        """Return what a watcher waits with, ``limit_s`` at most each time; to be ended.

        While it waits, ``take`` is called with each change first, in the step in which it happens.
        """
        watch = Watch(self._watches, limit_s, take)
        self._watches[watch] = None
        return watch

    async def wait_beyond(self, count: int) -> None:
        """Return once there are more than ``count`` events, or none will come.

        May be cancelled at any time; the log is not changed by that.
        """
        while len(self.events) <= count and not self._closed:
            await _join(self._waiters)

    async def wait_closed(self) -> None:
        """Return once no event will come any more; may be cancelled at any time."""
        while not self._closed:
            await _join(self._closing)


Take = Callable[[], bool]
"""Says whether it has dealt with a change; neither waits nor touches the log."""


class Watch:
    """One watcher's waiting for a log to change.

    It has one timer, which is moved when it fires: to move it with each event would cost
    as much as all the rest of the waiting.
    """

    __slots__ = ("_limit_s", "_loop", "_since", "_take", "_timer", "_waiter", "_watches")

    def __init__(self, watches: dict["Watch", None], limit_s: float, take: Take | None) -> None:
        self._watches = watches
        self._take = take
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._waiter: asyncio.Future[bool] | None = None
        self._timer = self._loop.call_later(limit_s, self._look)

    async def wait_change(self) -> bool:
        """Return ``True`` at the next change that is not taken, ``False`` after ``limit_s`` without any.

        May be cancelled at any time; the log is not changed by that.
        """
        self._since = self._loop.time()
        self._waiter = self._loop.create_future()
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def tell(self) -> None:
        """Have the change taken, or wake the watcher if it waits."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        try:
            if self._take is not None and self._take():
                self._since = self._loop.time()
            else:
                waiter.set_result(True)
        except Exception as error:  # the watcher's own, and no business of the turn's
            waiter.set_exception(error)

    def end(self) -> None:
        """Stop the timer, and be told of nothing any more."""
        self._timer.cancel()
        self._watches.pop(self, None)

    def _look(self) -> None:
        left_s = self._since + self._limit_s - self._loop.time()
        if left_s <= 0:
            left_s = self._limit_s
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(False)
        self._timer = self._loop.call_later(left_s, self._look)


def _wake(waiters: dict[asyncio.Future[bool], None]) -> None:
    woken = list(waiters)
    waiters.clear()
    for waiter in woken:
        if not waiter.done():
            waiter.set_result(True)


async def _join(waiters: dict[asyncio.Future[bool], None]) -> None:
    waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    waiters[waiter] = None
    try:
        await waiter
    finally:
        waiters.pop(waiter, None)  # cancelled: nobody else takes it out
