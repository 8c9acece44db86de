"""When the process has more to do than it can keep up with: who is refused, so that the rest goes on.

Two delays tell. The event loop's lag, which is how late a timer comes, sees whatever keeps the loop
busy. The shortest wait for a commit sees what queues behind the store; the shortest, since a queue
that stands delays everybody (CoDel, RFC 8289), and beyond the shortest ever, which is the store's
own time (as the round trip without load of TCP Vegas). A thousand streams that wait for their models
move neither, and are no load.

What is bounded is how many turns are in flight: each has at most one step to do in each round of the
loop, so their number bounds the round's length, and with it what a refusal waits for. The bound doubles
while all is calm (slow start, RFC 5681); when there is an overload it is cut by a tenth, and from then
on it grows a little with each calm window (AIMD: Chiu and Jain 1989; ``AIMDLimit`` of Netflix's
concurrency-limits, whose the tenth is, too). Every decision is a plain call.
"""

import asyncio
from collections.abc import Callable
from enum import Enum
from math import inf
from statistics import median

from app.domain.errors import Overloaded
from app.ports import Clock

TICK_S, SLOW_TICK_S = 0.01, 0.1
"""How often the lag is looked at: each look wakes the process, for up to 60 us."""
WINDOW_S = 0.1
SAMPLES = 3
"""A window has at least so many of the loop's lag, and its lag is their median: one stall is no overload."""
TYPICAL = 0.5
"""The median of a lag that swings, as it does when there is always work, against its peaks."""
QUEUED = 4
"""The shortest commit may wait so many times as long as the loop may typically lag."""
CHOKED = 4
"""At so many times that lag other requests are refused, too: there are no turns left to refuse."""
START = 512
"""So many turns at once are let in before anything is felt, and always while nobody has been refused."""
LEAST = 256
"""So many keep any store busy: a queue for commits does not take the bound below."""
LEAST_OF_ALL = 16
BACKOFF = 0.9
GROWTH = 0.02
CALM_WINDOWS = 20
"""After so many in a row all is as at the start: the bound is no less, and doubles again."""
RETRY_S = 3
"""Those who are refused together are sent away for one to so many seconds, by turns."""


class Burden(Enum):
    """What a request may mean for the process."""

    TURN = "turn"
    OTHER = "other"
    NONE = "none"  # must get through, whatever happens


class Gate:
    """Bounds the turns in flight when the loop lags by up to ``lag_s``, or commits queue up.

    ``limit`` is how many there may be now. ``count`` is told of each refusal.
    """

    def __init__(self, lag_s: float, count: Callable[[Overloaded], object]) -> None:
        self._lag_s = TYPICAL * lag_s
        self._count = count
        self.limit: float = START
        self.in_flight = 0
        self._is_slow_start = True
        self._has_refused = False
        self._is_choked = False
        self._refusals = 0
        self._calm_windows = 0  # in a row
        self._window_ends = 0.0
        self._lags: list[float] = []
        self._commit_s = self._quickest_s = inf

    def enter(self, burden: Burden) -> None:
        """Let a request in; one that is a turn has to ``leave``.

        Raises:
            Overloaded: it is refused.
        """
        self.check(burden)
        if burden is Burden.TURN:
            self.in_flight += 1

    def check(self, burden: Burden) -> None:
        """Let a request go on to where it may ``enter``.

        Raises:
            Overloaded: it is refused.
        """
        if self.is_closed_to(burden):
            refusal = Overloaded(retry_after_s=1 + self._refusals % RETRY_S)
            self._refusals += 1
            self._has_refused = True
            self._count(refusal)
            raise refusal

    def is_closed_to(self, burden: Burden) -> bool:
        """Whether such a request would be refused now."""
        if burden is Burden.TURN:
            return self.in_flight >= self.limit
        return self._is_choked and burden is Burden.OTHER

    @property
    def tick_s(self) -> float:
        """In how many seconds to look at the lag again: soon only if there are turns to refuse."""
        return TICK_S if self.in_flight >= LEAST_OF_ALL else SLOW_TICK_S

    def leave(self) -> None:
        """Note that a turn which was let in has been answered, or is none."""
        self.in_flight -= 1

    def note_commit(self, delay_s: float) -> None:
        """Take note of how long the store took to commit a turn."""
        self._commit_s = min(self._commit_s, delay_s)

    def note_lag(self, lag_s: float, now: float) -> None:
        """Take note of the loop's lag at ``now``, seconds of the monotonic clock; a window may end here."""
        self._lags.append(lag_s)
        if now < self._window_ends or len(self._lags) < SAMPLES:
            return
        self._quickest_s = min(self._quickest_s, self._commit_s)
        has_queue = QUEUED * self._lag_s < self._commit_s - self._quickest_s < inf
        self._judge(median(self._lags), has_queue)
        self._lags.clear()
        self._commit_s = inf
        self._window_ends = now + WINDOW_S

    def _judge(self, lag_s: float, has_queue: bool) -> None:
        lags = lag_s > self._lag_s
        self._is_choked = lag_s > CHOKED * self._lag_s
        if lags or has_queue:
            self._calm_windows = 0
            self._cut(LEAST_OF_ALL if lags else LEAST)
            return
        self._has_refused = False
        self._calm_windows += 1
        if self._calm_windows == CALM_WINDOWS:
            self._is_slow_start, self.limit = True, max(START, self.limit)
        if 2 * self.in_flight > self.limit:
            self.limit = 2 * self.in_flight if self._is_slow_start else self.limit * (1 + GROWTH)

    def _cut(self, least: int) -> None:
        if self.in_flight >= self.limit + 1:
            return  # the last cut is not felt yet: its turns have not ended
        self._is_slow_start = False
        if not self._has_refused:
            least = START  # so few as there are do not need to be fewer
        self.limit = max(min(least, self.limit), int(BACKOFF * self.in_flight))
        self._has_refused = False


class Place:
    """What one turn takes of ``gate``, until it leaves.

    Raises:
        Overloaded: there is none.
    """

    __slots__ = ("_gate",)

    def __init__(self, gate: Gate) -> None:
        gate.enter(Burden.TURN)
        self._gate: Gate | None = gate

    def leave(self) -> None:
        """Give the place back; harmless a second time."""
        if self._gate is not None:
            self._gate.leave()
            self._gate = None


class LagProbe:
    """Tells ``gate`` of the running event loop's lag, until it is stopped."""

    def __init__(self, clock: Clock, gate: Gate) -> None:
        self._clock = clock
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._wait()

    def stop(self) -> None:
        self._timer.cancel()

    def _wait(self) -> None:
        tick_s = self._gate.tick_s
        self._due = self._clock.monotonic() + tick_s
        self._timer = self._loop.call_later(tick_s, self._look)

    def _look(self) -> None:
        now = self._clock.monotonic()
        self._gate.note_lag(max(0.0, now - self._due), now)
        self._wait()
