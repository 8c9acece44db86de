"""What an operator does."""

from dataclasses import dataclass
from enum import StrEnum

from app.domain.ids import SessionKey
from app.domain.stats import LiveSession, PoolStats, SweepResult


class CleanupMode(StrEnum):
    EXPIRED = "expired"
    IDLE = "idle"
    OLDEST = "oldest"


class LiveOrder(StrEnum):
    IDLE = "idle"
    BUSY = "busy"
    RECENT = "recent"


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
class Health:
    status: HealthStatus
    checks: dict[str, HealthStatus]


@dataclass(frozen=True, slots=True)
class Cleanup:
    mode: CleanupMode
    result: SweepResult
    duration_ms: int


class AdminService:
    def stats(self) -> AdminStats: ...
    def live_sessions(
        self, *, limit: int = 50, cursor: str | None = None, by: LiveOrder = LiveOrder.RECENT
    ) -> tuple[tuple[LiveSession, ...], int, str | None]:
        """(page, total, next_cursor)"""
        ...
    async def evict(self, key: SessionKey, *, force: bool = False) -> None:
        """AgentNotFound when not live; SessionBusy when busy and not force."""
    async def cleanup(
        self, mode: CleanupMode = CleanupMode.EXPIRED, *, idle_s: float | None = None, count: int | None = None, dry_run: bool = False
    ) -> Cleanup: ...
    async def health(self) -> Health: ...
    async def ready(self) -> str | None:
        """None when ready, else an error code: DRAINING or STORE_UNAVAILABLE."""
    def session_count(self) -> int | None: ...
    def live_count(self) -> int: ...
