"""Where the requests of users are counted: in this process, or in Redis for all nodes.

In Redis by the ``limits`` library, with sliding windows of two counters: the one before counts by the
part of it that is still in sight (https://blog.cloudflare.com/counting-things-a-lot-of-different-things/).
In one process when each request of a user came is remembered, and so no minute has more than there may
be. The library's counter in memory looks at every key again after each request (0.7 ms each with
10,000 users, measured with version 5.8).
"""

from collections import deque
from typing import TYPE_CHECKING

from cachetools import TTLCache

from app.domain.errors import StoreUnavailable
from app.ports import Clock, Count, RequestCounter

if TYPE_CHECKING:
    from limits import RateLimitItem

MEMORY = "memory://"
REDIS_SCHEMES = ("redis://", "rediss://", "unix://", "redis+sentinel://")
MOST_USERS = 100_000
CONNECTIONS = 8
_PREFIX = "agentpool-requests"


def open_counter(url: str, clock: Clock) -> RequestCounter:
    """Return what ``url`` names; nothing is asked yet.

    Raises:
        ValueError: it names nothing, or what it needs is not installed; never repeats it.
    """
    if url == MEMORY:
        return MemoryCounter(clock)
    if not url.startswith(REDIS_SCHEMES):
        raise ValueError(f"must be {MEMORY} or begin with {', '.join(REDIS_SCHEMES)}")
    try:
        return RedisCounter(url, clock)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"redis", "hiredis"}:
            raise
        raise ValueError("Redis needs an extra: pip install 'agentpool[redis]'.") from None


class MemoryCounter:
    """Counts for one process; a restart forgets. Some 32 bytes for each request of the last window."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._users: TTLCache[tuple[str, int], deque[float]] | None = None

    async def count(self, user_id: str, limit: int, window_s: int) -> Count:
        if self._users is None:
            self._users = TTLCache(MOST_USERS, window_s, timer=self._clock.monotonic)
        now = self._clock.monotonic()
        moments = self._users.get((user_id, window_s)) or deque()
        while moments and moments[0] + window_s <= now:
            moments.popleft()
        if is_in := len(moments) < limit:
            moments.append(now)
            self._users[user_id, window_s] = moments  # known until its newest request is out of sight
        return Count(is_in, limit - len(moments), moments[0] + window_s - now)

    async def close(self) -> None:
        """Do nothing: there is nothing open."""


class RedisCounter:
    """Counts in Redis, by scripts of the ``limits`` library.

    Raises:
        ValueError: ``url`` is no address; never repeats it.
    """

    def __init__(self, url: str, clock: Clock) -> None:
        from limits.aio.storage import RedisStorage
        from limits.aio.strategies import SlidingWindowCounterRateLimiter

        from app.stores.redis.address import Address

        self._clock = clock
        self._address = Address(url)
        self._pool = self._address.pool(CONNECTIONS)
        storage = RedisStorage(
            "async+redis://",  # not asked: the pool knows where
            implementation="redispy",
            key_prefix=_PREFIX,
            connection_pool=self._pool,  # type: ignore[arg-type]  # as its documentation says
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def count(self, user_id: str, limit: int, window_s: int) -> Count:
        from redis.exceptions import RedisError

        item = _item(limit, window_s)
        try:
            is_in = await self._limiter.hit(item, user_id)
            reset_at, remaining = await self._limiter.get_window_stats(item, user_id)
        except (RedisError, OSError) as error:
            raise StoreUnavailable() from error
        reset_s = min(max(0.0, reset_at - self._clock.now_ms() / 1000), float(window_s))
        return Count(is_in, remaining if is_in else 0, reset_s)

    async def close(self) -> None:
        await self._pool.disconnect()
        await self._address.close()


def _item(limit: int, window_s: int) -> "RateLimitItem":
    from limits import RateLimitItemPerSecond

    return RateLimitItemPerSecond(limit, window_s)
