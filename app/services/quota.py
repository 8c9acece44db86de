"""What a user may have: requests per minute, turns at a time, tokens per day. 0 = any number.

Requests are counted for the users of credentials, and where all nodes see it. Turns at a time are
those of this process; tokens are those of the store, remembered for a while, and what this process
estimates for turns that ended before their provider had counted.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from cachetools import TTLCache

from app.domain.errors import RateLimited, StoreUnavailable
from app.domain.quota import Quota, Spent, UserKey
from app.domain.stats import UserUsage
from app.ports import Clock, Count, RequestCounter

MINUTE_S = 60
DAY_S = 86_400
KNOWN_S = 10.0
"""How long the store's sum of a user's tokens is believed: so long other nodes' turns are not seen."""
KNOWN_USERS = 100_000
COUNT_S = 0.2
"""How long the counter of requests is waited for."""
PAUSE_S = 5.0
"""How long it is not asked again when it did not answer."""
COMPLAIN_S = 60.0

ReadUsage = Callable[[str, str, int], Awaitable[UserUsage]]

_log = logging.getLogger(__name__)


class RequestQuota:
    """Counts the requests of users.

    While the ``counter`` does not answer, the ``stand_in`` counts, in this process alone: to refuse
    everybody would be worse than what is protected from, and to let everybody in would let a single
    user who makes the counter late switch the limit off. Each request then waits ``COUNT_S`` at most,
    and most of them not at all. With N processes a user may then have N times as much.
    """

    def __init__(
        self, counter: RequestCounter, stand_in: RequestCounter, clock: Clock, per_minute: int
    ) -> None:
        self._counter = counter
        self._stand_in = stand_in
        self._clock = clock
        self._limit = per_minute
        self._ask_from = self._complain_from = float("-inf")

    async def take(self, user_id: str) -> Quota:
        """Count a request; return what is left.

        Raises:
            RateLimited: it is one too many.
        """
        count = await self._count(user_id)
        quota = Quota(self._limit, count.remaining, count.reset_s, MINUTE_S, "requests")
        if not count.is_in:
            raise RateLimited("This user has made as many requests as allowed for now.", quota=quota)
        return quota

    async def close(self) -> None:
        await self._counter.close()

    async def _count(self, user_id: str) -> Count:
        if self._clock.monotonic() >= self._ask_from:
            try:
                async with asyncio.timeout(COUNT_S):
                    return await self._counter.count(user_id, self._limit, MINUTE_S)
            except (StoreUnavailable, TimeoutError) as error:
                self._pause(error)
        return await self._stand_in.count(user_id, self._limit, MINUTE_S)

    def _pause(self, error: Exception) -> None:
        now = self._clock.monotonic()
        self._ask_from = now + PAUSE_S
        if now >= self._complain_from:
            self._complain_from = now + COMPLAIN_S
            _log.warning(
                "requests are counted by this process alone: the counter does not answer (%r)", error
            )


@dataclass(slots=True, eq=False)  # each read has its own, however equal: they end in any order
class _Known:
    """Tokens of one day, counted from the epoch in UTC."""

    day: int
    tokens: int = 0


class TurnQuota:
    """Decides whether a user may have one more turn. Every decision is a plain call.

    ``read_usage`` is the store's. A turn that begins below the limit of tokens may end above it.
    """

    def __init__(
        self,
        clock: Clock,
        read_usage: ReadUsage | None = None,
        *,
        concurrent: int = 0,
        tokens_per_day: int = 0,
    ) -> None:
        self._clock = clock
        self._read_usage = read_usage
        self._concurrent = concurrent
        self._tokens_per_day = tokens_per_day
        self._turns: Counter[UserKey] = Counter()
        self._known: TTLCache[UserKey, _Known] = TTLCache(KNOWN_USERS, KNOWN_S, timer=clock.monotonic)
        self._reading: dict[UserKey, list[_Known]] = {}
        self._erased: TTLCache[UserKey, Spent] = TTLCache(KNOWN_USERS, DAY_S, timer=clock.monotonic)

    async def learn(self, user: UserKey | None) -> int:
        """Return how many tokens the user's turns have taken today; asks the store where that is not known.

        Raises:
            StoreUnavailable
        """
        if user is None or not self._tokens_per_day or self._read_usage is None:
            return 0
        today = self._today()
        known = self._known.get(user)
        if known is None or known.day != today:
            known = self._known[user] = await self._read(user, today, self._read_usage)
        return known.tokens

    def admit(self, user: UserKey | None, spent: int) -> tuple[Quota, ...]:
        """Count one more turn of a user who has ``spent`` so many tokens today; return what is left.

        Every turn that was admitted is to be released.

        Raises:
            RateLimited: it is not to be; nothing was counted.
        """
        if user is None:
            return ()
        quotas = self.check(user, spent)
        if self._concurrent:
            self._turns[user] += 1
        return quotas

    def check(self, user: UserKey, spent: int) -> tuple[Quota, ...]:
        """Return what would be left after one more turn of this user.

        Raises:
            RateLimited: there may be none.
        """
        quotas: list[Quota] = []
        if limit := self._concurrent:
            left = limit - self._turns[user] - 1
            quotas.append(Quota(limit, max(0, left), 1, None, "turns"))
            if left < 0:
                raise RateLimited("This user has as many turns under way as allowed.", quota=quotas[-1])
        if limit := self._tokens_per_day:
            reset_s = DAY_S - self._clock.now_ms() / 1000 % DAY_S
            quotas.append(Quota(limit, max(0, limit - spent), reset_s, DAY_S, "tokens"))
            if spent >= limit:
                raise RateLimited("This user has used as many tokens today as allowed.", quota=quotas[-1])
        return tuple(quotas)

    def release(self, user: UserKey | None, tokens: int = 0) -> None:
        """Count a turn that has ended, and what it took."""
        if user is None:
            return
        if self._concurrent:
            self._turns[user] -= 1
            if not self._turns[user]:
                del self._turns[user]
        if self._tokens_per_day and tokens:
            known = self._known.get(user)
            for spent in (*self._reading.get(user, ()), *((known,) if known is not None else ())):
                spent.tokens += tokens

    def note_uncounted(self, user: UserKey | None, tokens: int) -> None:
        """Count what a turn took which ended without the provider saying what; so the store does not know.

        Only this process does, until it ends.
        """
        if user is None or not self._tokens_per_day or not tokens:
            return
        today = self._today()
        before = self._erased.get(user)
        if before is None or before.day != today:
            before = Spent(today, 0, 0)
        # In one sum with what was erased: an erasure of both passes it on.
        self._erased[user] = replace(before, tokens=before.tokens + tokens)
        if (known := self._known.get(user)) is not None:
            known.tokens += tokens

    def forget(self, user: UserKey | None) -> None:
        """Have the store asked again: something was used that was not released."""
        if user is not None:
            self._known.pop(user, None)

    async def measure(self, user: UserKey) -> Spent | None:
        """Return what ``note_erasure`` is to be told before the store forgets the user; ``None``: nothing.

        Raises:
            StoreUnavailable
        """
        if not self._tokens_per_day:
            return None
        self.forget(user)
        tokens, today = await self.learn(user), self._today()
        before = self._erased.get(user)
        missing = before.tokens - before.stored if before is not None and before.day == today else 0
        return Spent(today, tokens, tokens - missing)

    def note_erasure(self, user: UserKey, spent: Spent | None) -> None:
        """Remember what a user has spent today whom the store forgets, or has forgotten.

        Else whoever erases themselves could begin the day anew. It is only in the memory of the
        processes that were told of it: one that starts afterwards does not know it.
        """
        if spent is not None:
            self._erased[user] = spent
            self.forget(user)

    def _count_missing(self, user: UserKey, today: int, stored: int) -> int:
        """Return how many of the user's tokens are not among the ``stored``, since those were erased."""
        erased = self._erased.get(user)
        if erased is None or erased.day != today:
            return 0
        # A sum only grows: if it is less, the erasure has come so far, whatever its caller was told.
        if stored < erased.stored:
            erased = self._erased[user] = replace(erased, stored=0)
        return erased.tokens - erased.stored

    async def _read(self, user: UserKey, today: int, read: ReadUsage) -> _Known:
        # What ends while the store is asked counts in either case: twice at worst, until it is asked again.
        known = _Known(today)
        self._reading.setdefault(user, []).append(known)
        try:
            usage = await read(*user, 2)
        finally:
            self._reading[user].remove(known)
            if not self._reading[user]:
                del self._reading[user]
        stored = sum(d.prompt_tokens + d.completion_tokens for d in usage.days if d.day == today)
        known.tokens += stored + self._count_missing(user, today, stored)
        return known

    def _today(self) -> int:
        return self._clock.now_ms() // (1000 * DAY_S)
