"""What is counted in Redis, and the sweep, which keeps the counts by status right and purges what is due."""

from collections import Counter

from app.domain.session import SessionStatus
from app.domain.stats import DayUsage, SessionStats, UserUsage
from app.stores import rules
from app.stores.buckets import P95, PREFIX, percentile
from app.stores.redis.database import Database
from app.stores.redis.keys import user_of

SESSIONS_PER_STEP = 500
"""How many sessions a step of the sweep moves; meanwhile no turn is served."""
PURGED_PER_STEP = 50

_KINDS = "t", "p", "c"


async def get_usage(db: Database, owner: str, user_id: str, limit: int) -> UserUsage:
    found = await db.read("HGETALL", db.name(f"g:{user_of(owner, user_id)}"))
    counts = {name.decode(): int(value) for name, value in zip(found[::2], found[1::2], strict=True)}
    days = sorted({int(name.partition(":")[0]) for name in counts if name[0] != "a"}, reverse=True)
    listed = (DayUsage(day, *(counts.get(f"{day}:{kind}", 0) for kind in _KINDS)) for day in days[:limit])
    turns, read, written = (counts.get(f"all:{kind}", 0) for kind in _KINDS)
    return UserUsage(turns, read, written, tuple(listed))


async def read_counts(db: Database) -> Counter[str]:
    found = await db.read("HGETALL", db.name("n"))
    return Counter({name.decode(): int(value) for name, value in zip(found[::2], found[1::2], strict=True)})


async def get_session_stats(db: Database) -> SessionStats:
    counts = await read_counts(db)
    db.session_count = await db.read("ZCARD", db.name("z:all"))
    buckets = {
        int(name.removeprefix(PREFIX)): count for name, count in counts.items() if name.startswith(PREFIX)
    }
    same = ("created", "lifetime_ms", "turns", "turns_failed", "turns_finished", "response_ms")
    return SessionStats(
        total=db.session_count or 0,
        tokens=counts["prompt_tokens"] + counts["completion_tokens"],
        p95_response_ms=percentile(buckets, P95),
        **{status.value: counts[status.value] for status in SessionStatus},
        **{name: counts[name] for name in same},
    )


async def sweep(db: Database, now: int = 0) -> int:
    """Bring the phases up to ``now``, or as they were at the last sweep to the idle time as it is now.

    Returns how many sessions have expired since the last sweep.
    """
    expired, is_last, idle_ms = 0, 0, db.life.idle_after_s * 1000
    while not is_last:
        expired, is_last = await db.tell("sweep", now, idle_ms, SESSIONS_PER_STEP, repeats=False)
    return expired


async def expire_and_purge(db: Database, now: int, limit: int) -> tuple[int, int]:
    """Sweep in steps, between which turns are served; what a step has done stays done."""
    expired, purged = await sweep(db, now), 0
    line = rules.purge_line(now, db.life)
    while line is not None and purged < limit:
        most = min(PURGED_PER_STEP, limit - purged)
        db.session_count, gone = await db.tell("purge", line, most, repeats=False)
        purged += gone
        if gone < most:
            break
    return expired, purged
