"""What an operator does: look at the pool, clean it up, ask how it is."""

import asyncio
import base64
import binascii
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from app.domain.errors import AgentNotFound, AgentPoolError, InvalidInput, RunsElsewhere, SessionBusy
from app.domain.ids import SessionKey
from app.domain.lease import Node
from app.domain.stats import LiveSession, LiveStatus, PoolStats, ProcessMemory, SweepResult
from app.domain.turn import CancelReason, JsonObject
from app.pool.manager import AgentManager
from app.ports import Clock, SessionStore
from app.services.ownership import Ownership
from app.services.turns import Turns

PING_TIMEOUT_S = 1.0
LAG_DEGRADED_S = 0.25
LAG_UNHEALTHY_S = 2.0

_log = logging.getLogger(__name__)


class CleanupMode(StrEnum):
    EXPIRED = "expired"  # idle for longer than the TTL
    IDLE = "idle"  # idle for longer than asked for
    OLDEST = "oldest"  # least recently used


class LiveOrder(StrEnum):
    IDLE = "idle"  # longest idle first
    BUSY = "busy"  # busy ones first
    RECENT = "recent"  # most recently used first


class HealthStatus(StrEnum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True, slots=True)
class AdminStats:
    pool: PoolStats
    rss_bytes: int
    limit_bytes: int
    uptime_s: float


@dataclass(frozen=True, slots=True)
class NodeStats:
    """A process and what its ``GET /agent-stats`` says; ``None``: this one, or it does not answer."""

    node: Node
    stats: JsonObject | None
    is_here: bool = False


@dataclass(frozen=True, slots=True)
class Health:
    """``status`` is the worst of ``checks``."""

    status: HealthStatus
    checks: dict[str, HealthStatus]


@dataclass(frozen=True, slots=True)
class Cleanup:
    mode: CleanupMode
    result: SweepResult
    duration_ms: int


class AdminService:
    """The pool's and the store's upkeep. ``sweep`` is what the runtime's timer calls.

    ``purge`` expires and purges sessions, and returns how many of each.
    """

    def __init__(
        self,
        store: SessionStore,
        pool: AgentManager,
        turns: Turns,
        clock: Clock,
        purge: Callable[[], Awaitable[tuple[int, int]]],
        memory: Callable[[], ProcessMemory],
        is_model_healthy: Callable[[], bool] = lambda: True,
        ownership: Ownership | None = None,
    ) -> None:
        self._store = store
        self._pool = pool
        self._turns = turns
        self._clock = clock
        self._purge = purge
        self._memory = memory
        self._is_model_healthy = is_model_healthy
        self._ownership = ownership or Ownership()
        self._started = clock.monotonic()
        self.loop_lag_s = 0.0  # kept by the runtime's timer

    def stats(self) -> AdminStats:
        """Return the counters, in O(1)."""
        memory = self._memory()
        uptime = self._clock.monotonic() - self._started
        return AdminStats(self._pool.stats(), memory.rss_bytes, memory.limit_bytes, uptime)

    async def require_node(self, boot_id: str | None) -> None:
        """Return if the node of that name is this one, or none is named.

        Raises:
            RunsElsewhere: it is another one, which is to answer.
            InvalidInput: there is no such node.
        """
        if boot_id in (None, self._ownership.here.boot_id):
            return
        for node in await self._ownership.nodes():
            if node.boot_id == boot_id:
                raise RunsElsewhere(node)
        raise InvalidInput("node", "is no node of this store")

    async def nodes(self) -> tuple[NodeStats, ...]:
        """Return every process that shares the store, this one first, with what its pool counts."""
        first, *others = await self._ownership.nodes()
        told = await self._ownership.stats_elsewhere()
        return NodeStats(first, None, is_here=True), *(NodeStats(node, told.get(node)) for node in others)

    async def wait_gone(self, node: Node) -> None:
        """Return when that process does not announce itself any more."""
        await self._ownership.wait_gone(node)

    def is_live(self, key: SessionKey) -> bool:
        """Whether the session has a live agent in this process."""
        return self._pool.is_live(key)

    def session_count(self) -> int | None:
        return self._store.session_count_nowait()

    def live_count(self) -> int:
        return self._pool.live_count()

    def live_sessions(
        self, *, limit: int = 50, cursor: str | None = None, by: LiveOrder = LiveOrder.RECENT
    ) -> tuple[tuple[LiveSession, ...], int, str | None]:
        """Return a page of the live agents, how many there are, and the next page's cursor.

        Raises:
            InvalidInput: the cursor is malformed.
        """
        start = _parse_cursor(cursor)
        ordered = sorted(self._pool.live_sessions(), key=_ORDERS[by])
        page = tuple(ordered[start : start + limit])
        rest = len(ordered) > start + limit
        return page, len(ordered), _to_cursor(start + limit) if rest else None

    async def evict(self, key: SessionKey, *, force: bool = False) -> None:
        """Drop a session's live agent; the session stays. ``force`` cancels its running turn.

        Raises:
            AgentNotFound: it has none.
            SessionBusy: it is in use, and not ``force``, or not by a turn.
            RunsElsewhere: another node has it.
        """
        if self._pool.evict(key):
            return
        if not self._pool.is_live(key):
            if (node := await self._ownership.locate_live(key)) is not None:
                raise RunsElsewhere(node, session_id=key.session_id)
            raise AgentNotFound("This session has no live agent.", session_id=key.session_id)
        running = self._turns.get(self._pool.owner_of(key))
        if running is None or not force:
            turn_id = running.turn_id if running else None
            raise SessionBusy(session_id=key.session_id, turn_id=turn_id)
        running.cancel(CancelReason.ADMIN, keep_partial=False)
        await running.log.wait_closed()
        self._pool.evict(key)  # if it was being stored already it has won, and its agent is idle

    async def cleanup(
        self,
        mode: CleanupMode = CleanupMode.EXPIRED,
        *,
        idle_s: float | None = None,
        count: int | None = None,
        dry_run: bool = False,
    ) -> Cleanup:
        """Evict live agents as ``mode`` says, and expire and purge sessions that are due.

        A busy agent is never removed. ``dry_run`` changes nothing and counts only agents.

        Raises:
            InvalidInput: ``mode`` lacks its number.
        """
        started = self._clock.monotonic()
        result = self._clean(mode, idle_s, count, dry_run)
        if not dry_run:
            expired, purged = await self._purge()
            result = replace(result, sessions_expired=expired, sessions_purged=purged)
        return Cleanup(mode, result, round((self._clock.monotonic() - started) * 1000))

    async def sweep(self) -> None:
        """Evict, expire and purge what is due; a store that does not answer is tried again next time."""
        self._pool.sweep()
        self._turns.sweep()
        try:
            await self._purge()
        except AgentPoolError as error:
            _log.warning("sweep: sessions could not be purged now: %s", error)

    async def health(self) -> Health:
        """Return how each part is; waits at most ``PING_TIMEOUT_S`` for the store."""
        checks = {
            "pool": self._pool_health(),
            "store": await self._store_health(),
            "model": HealthStatus.HEALTHY if self._is_model_healthy() else HealthStatus.DEGRADED,
            "event_loop": _lag_health(self.loop_lag_s),
        }
        worst = max(checks.values(), key=list(HealthStatus).index)
        return Health(worst, checks)

    async def ready(self) -> str | None:
        """Return ``None`` if new turns are welcome, else the error code that they would get."""
        if self._pool.stats().draining:
            return "DRAINING"
        return None if await self._store_health() is HealthStatus.HEALTHY else "STORE_UNAVAILABLE"

    def _clean(
        self, mode: CleanupMode, idle_s: float | None, count: int | None, dry_run: bool
    ) -> SweepResult:
        if mode is CleanupMode.IDLE:
            if idle_s is None:
                raise InvalidInput("idle_s", "is required with mode idle")
            return self._pool.cleanup_idle(idle_s, dry_run=dry_run)
        if mode is CleanupMode.OLDEST:
            if count is None:
                raise InvalidInput("count", "is required with mode oldest")
            return self._pool.cleanup_oldest(count, dry_run=dry_run)
        return self._pool.sweep(dry_run=dry_run)

    def _pool_health(self) -> HealthStatus:
        stats = self._pool.stats()
        if stats.zombies > self._pool.limits.zombies_tolerated:
            return HealthStatus.UNHEALTHY
        return HealthStatus.DEGRADED if stats.draining or stats.zombies else HealthStatus.HEALTHY

    async def _store_health(self) -> HealthStatus:
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await self._store.ping()
        except (AgentPoolError, TimeoutError):
            return HealthStatus.UNHEALTHY
        return HealthStatus.HEALTHY


_ORDERS: dict[LiveOrder, Callable[[LiveSession], tuple[float, str]]] = {
    LiveOrder.IDLE: lambda live: (-live.idle_s, live.session_id),
    LiveOrder.BUSY: lambda live: (live.status is not LiveStatus.BUSY, live.session_id),
    LiveOrder.RECENT: lambda live: (live.idle_s, live.session_id),
}


def _lag_health(lag_s: float) -> HealthStatus:
    if lag_s >= LAG_UNHEALTHY_S:
        return HealthStatus.UNHEALTHY
    return HealthStatus.DEGRADED if lag_s >= LAG_DEGRADED_S else HealthStatus.HEALTHY


def _to_cursor(start: int) -> str:
    return base64.urlsafe_b64encode(str(start).encode()).decode().rstrip("=")


def _parse_cursor(cursor: str | None) -> int:
    if cursor is None:
        return 0
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    if not text.isdigit() or len(text) > 9:
        raise InvalidInput("cursor", "is not a cursor of this list")
    return int(text)
