"""What an operator sends and gets: questions and answers about the pool of live agents."""

from typing import Literal

from pydantic import BaseModel, Field

from app.api.native.fields import TTL_MAX_S, Body, Flag, NoQuery, PageQuery, SessionQuery
from app.api.native.responses import NextCursor, Total
from app.domain.stats import DiscardCause, EvictionCause, LiveSession
from app.services.admin import AdminStats, Cleanup, Health, NodeStats

HealthName = Literal["healthy", "degraded", "unhealthy"]


class NodeQuery(NoQuery):
    """Which node is asked."""

    node: str | None = Field(
        default=None,
        max_length=64,
        description="One of `GET /agent-nodes`; left out: whichever gets the request.",
    )


class CleanupBody(Body):
    """Which live agents to drop; sessions stay."""

    mode: Literal["expired", "idle", "oldest"] | None = Field(
        default=None,
        description="`expired`: those whose time is over (default); `idle`: those idle for `idle_s`; "
        "`oldest`: the `count` least recently used.",
        examples=["oldest"],
    )
    idle_s: float | None = Field(
        default=None, ge=0, le=TTL_MAX_S, description="For `idle`: seconds.", examples=[600]
    )
    count: int | None = Field(
        default=None, ge=1, le=1_000_000, description="How many at most.", examples=[10]
    )
    dry_run: bool | None = Field(
        default=None, description="Only say what would be dropped.", examples=[False]
    )


class LiveListQuery(PageQuery, NodeQuery):
    """Which live agents come first."""

    by: Literal["idle", "busy", "recent"] = Field(
        default="recent",
        description="Order: longest idle, busy, or most recently used first.",
        examples=["idle"],
    )


class EvictQuery(SessionQuery):
    """Whether a busy agent may be dropped."""

    force: Flag = Field(default=False, description="Cancel its running turn.", examples=[False])


class MemoryAnswer(BaseModel):
    """Bytes."""

    estimated_bytes: int = Field(description="What the live agents take, estimated.", examples=[1_048_576])
    rss_bytes: int = Field(description="What the process takes.", examples=[125_829_120])
    limit_bytes: int = Field(description="What it may take.", examples=[2_147_483_648])


class StatsAnswer(BaseModel):
    """The pool's counters."""

    total_agents: int = Field(description="Agents that hold a place.", examples=[15])
    active_agents: int = Field(description="Agents that work on a turn.", examples=[8])
    idle_agents: int = Field(description="Agents that wait for their next turn.", examples=[7])
    activating_agents: int = Field(description="Agents that are being built.", examples=[0])
    zombie_agents: int = Field(description="Turns that ignore their cancellation.", examples=[0])
    max_agents: int = Field(description="Most agents at a time.", examples=[100])
    agent_ttl: int | float = Field(
        description="Seconds after which an idle agent is dropped.", examples=[3600]
    )
    waiting: int = Field(description="Turns that wait for a place.", examples=[0])
    utilization: float = Field(description="total_agents / max_agents.", examples=[0.15])
    hits: int = Field(description="Turns that found their agent live.", examples=[420])
    misses: int = Field(description="Turns that did not.", examples=[80])
    restores: int = Field(description="Agents that were rebuilt from the store.", examples=[30])
    hit_ratio: float = Field(description="hits / (hits + misses).", examples=[0.84])
    evictions: dict[str, int] = Field(description="Idle agents dropped, by cause.", examples=[{"ttl": 3}])
    discards: dict[str, int] = Field(
        description="Agents dropped because they may be wrong, by cause.", examples=[{"error": 1}]
    )
    rejections: dict[str, int] = Field(
        description="Turns refused, by error code.", examples=[{"POOL_EXHAUSTED": 2}]
    )
    memory: MemoryAnswer = Field(description="Memory.")
    uptime_s: float = Field(description="Seconds since the start.", examples=[86400.0])
    draining: bool = Field(description="Whether new turns are refused.", examples=[False])

    @classmethod
    def of(cls, stats: AdminStats) -> "StatsAnswer":
        pool = stats.pool
        asked = pool.hits + pool.misses
        return cls(
            total_agents=pool.total,
            active_agents=pool.active,
            idle_agents=pool.idle,
            activating_agents=pool.activating,
            zombie_agents=pool.zombies,
            max_agents=pool.max_instances,
            agent_ttl=int(pool.idle_ttl_s) if pool.idle_ttl_s.is_integer() else pool.idle_ttl_s,
            waiting=pool.waiting,
            utilization=round(pool.total / pool.max_instances, 4) if pool.max_instances else 0.0,
            hits=pool.hits,
            misses=pool.misses,
            restores=pool.restores,
            hit_ratio=round(pool.hits / asked, 4) if asked else 0.0,
            evictions={**dict.fromkeys((c.value for c in EvictionCause), 0), **pool.evictions},
            discards={**dict.fromkeys((c.value for c in DiscardCause), 0), **pool.discards},
            rejections=pool.rejections,
            memory=MemoryAnswer(
                estimated_bytes=pool.estimated_bytes,
                rss_bytes=stats.rss_bytes,
                limit_bytes=stats.limit_bytes,
            ),
            uptime_s=round(stats.uptime_s, 3),
            draining=pool.draining,
        )


class LiveAnswer(BaseModel):
    """One live agent."""

    session_id: str = Field(description="Whose agent it is.", examples=["user_001"])
    user_id: str | None = Field(description="Whose session that is.", examples=["alice"])
    agent_id: str | None = Field(description="The agent profile.", examples=["assistant"])
    status: Literal["idle", "busy", "activating"] = Field(description="What it does.", examples=["idle"])
    idle_s: float = Field(description="Seconds since its last turn.", examples=[12.5])
    age_s: float = Field(description="Seconds since it was built.", examples=[340.0])
    turns: int = Field(description="Turns that it has carried out.", examples=[4])
    estimated_bytes: int = Field(description="What it takes, estimated.", examples=[20480])
    provider: str | None = Field(description="Its model's provider.", examples=["openai"])
    model: str | None = Field(description="Its model.", examples=["gpt-5-mini"])

    @classmethod
    def of(cls, live: LiveSession) -> "LiveAnswer":
        return cls(
            session_id=live.session_id,
            user_id=live.user_id,
            agent_id=live.agent_id,
            status=live.status.value,
            idle_s=round(live.idle_s, 3),
            age_s=round(live.age_s, 3),
            turns=live.turns,
            estimated_bytes=live.estimated_bytes,
            provider=live.provider,
            model=live.model,
        )


class LiveList(BaseModel):
    """A page of live agents."""

    sessions: list[LiveAnswer] = Field(description="The live agents, by session.")
    total: Total
    next_cursor: NextCursor

    @classmethod
    def of(cls, live: tuple[LiveSession, ...], total: int, next_cursor: str | None) -> "LiveList":
        return cls(sessions=[LiveAnswer.of(one) for one in live], total=total, next_cursor=next_cursor)


class CleanupAnswer(BaseModel):
    """What a cleanup did, or with `dry_run` would do."""

    mode: Literal["expired", "idle", "oldest"] = Field(description="As asked.", examples=["expired"])
    examined: int = Field(description="Agents looked at.", examples=[15])
    removed: int = Field(description="Agents dropped.", examples=[3])
    skipped_busy: int = Field(description="Agents left alone because they work.", examples=[8])
    remaining: int = Field(description="Agents left.", examples=[12])
    sessions_expired: int = Field(description="Sessions that expired since the last sweep.", examples=[0])
    sessions_purged: int = Field(description="Sessions removed for good.", examples=[0])
    duration_ms: int = Field(description="How long it took.", examples=[1])

    @classmethod
    def of(cls, cleanup: Cleanup) -> "CleanupAnswer":
        result = cleanup.result
        return cls(
            mode=cleanup.mode.value,
            examined=result.examined,
            removed=result.removed,
            skipped_busy=result.skipped_busy,
            remaining=result.remaining,
            sessions_expired=result.sessions_expired,
            sessions_purged=result.sessions_purged,
            duration_ms=cleanup.duration_ms,
        )


class ChecksAnswer(BaseModel):
    """Each part."""

    pool: HealthName = Field(description="The live agents.", examples=["healthy"])
    store: HealthName = Field(description="The database.", examples=["healthy"])
    model: HealthName = Field(description="The model's provider.", examples=["healthy"])
    event_loop: HealthName = Field(description="Whether the process keeps up.", examples=["healthy"])


class HealthAnswer(BaseModel):
    """How the parts are, and the worst of them."""

    status: HealthName = Field(description="The worst.", examples=["healthy"])
    checks: ChecksAnswer = Field(description="How each part is.")

    @classmethod
    def of(cls, health: Health) -> "HealthAnswer":
        checks = {name: status.value for name, status in health.checks.items()}
        return cls(status=health.status.value, checks=ChecksAnswer.model_validate(checks))


class NodeAnswer(BaseModel):
    """One process."""

    node: str = Field(description="Its name, new with each start.", examples=["0199c1f2-…"])
    url: str | None = Field(description="Where the others reach it.", examples=["http://10.0.0.5:40113"])
    is_here: bool = Field(description="Whether it is the one that answers.", examples=[True])
    stats: StatsAnswer | None = Field(description="Its pool; `null`: it does not answer.")

    @classmethod
    def of(cls, told: NodeStats, here: AdminStats) -> "NodeAnswer":
        stats = (
            StatsAnswer.of(here) if told.is_here else told.stats and StatsAnswer.model_validate(told.stats)
        )
        return cls(node=told.node.boot_id, url=told.node.url, is_here=told.is_here, stats=stats or None)


class NodeList(BaseModel):
    """The processes that share the store."""

    nodes: list[NodeAnswer] = Field(description="This one first.")
