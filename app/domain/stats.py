"""What can be counted about the pool and about sessions."""

from dataclasses import dataclass, field
from enum import StrEnum


class EvictionCause(StrEnum):
    """Why an idle live agent was dropped. Nobody notices: the next turn restores it."""

    TTL = "ttl"
    LRU = "lru"
    MEMORY = "memory"
    ADMIN = "admin"
    DRAIN = "drain"


class DiscardCause(StrEnum):
    """Why a live agent that may be wrong was dropped."""

    ERROR = "error"
    CANCEL = "cancel"
    CONFLICT = "conflict"
    DEADLINE = "deadline"


class LiveStatus(StrEnum):
    IDLE = "idle"
    BUSY = "busy"
    ACTIVATING = "activating"


@dataclass(frozen=True, slots=True)
class LiveSession:
    """One live agent as an operator sees it."""

    owner: str
    session_id: str
    user_id: str | None
    agent_id: str | None
    status: LiveStatus
    idle_s: float
    age_s: float
    turns: int
    estimated_bytes: int
    provider: str | None
    model: str | None


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counters only; reading them costs the same however many agents live."""

    active: int
    idle: int
    activating: int
    zombies: int
    waiting: int
    max_instances: int
    idle_ttl_s: float
    hits: int
    misses: int
    restores: int
    estimated_bytes: int
    draining: bool
    evictions: dict[str, int] = field(default_factory=dict)
    discards: dict[str, int] = field(default_factory=dict)
    rejections: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Agents that hold a place; never more than ``max_instances``."""
        return self.active + self.idle + self.activating + self.zombies


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What one sweep or cleanup did."""

    examined: int
    removed: int
    skipped_busy: int
    remaining: int
    sessions_expired: int = 0
    sessions_purged: int = 0


@dataclass(frozen=True, slots=True)
class DayUsage:
    """What a user's turns that ended on one day took; ``day`` counts from the epoch, in UTC."""

    day: int
    turns: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class UserUsage:
    """What a user's turns took, deleted sessions' too, and the newest days of it, newest first."""

    turns: int
    prompt_tokens: int
    completion_tokens: int
    days: tuple[DayUsage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStats:
    """The store's counters. Statuses lag behind the clock by at most one sweep.

    Turns, tokens and times are of all turns there ever were, ``created`` and
    ``lifetime_ms`` (creation to last activity, summed) of all sessions. Response times are
    those of finished turns; ``p95_response_ms`` is exact to a tenth.
    """

    total: int = 0
    active: int = 0
    idle: int = 0
    archived: int = 0
    expired: int = 0
    created: int = 0
    lifetime_ms: int = 0
    turns: int = 0
    turns_failed: int = 0
    turns_finished: int = 0
    response_ms: int = 0
    p95_response_ms: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """``limit_bytes`` is the smaller of the machine's memory and the process's own limit."""

    rss_bytes: int
    limit_bytes: int
