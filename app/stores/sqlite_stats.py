"""Statistics in SQLite: counters that every write keeps right in its own transaction.

Response times are counted in buckets of a logarithmic scale, eight to a doubling, so a
percentile is off by a twentieth at most.
"""

import math
from collections import Counter

import apsw

from app.domain.stats import SessionStats
from app.domain.turn import Turn, TurnStatus
from app.stores import rules
from app.stores.sqlite_records import PHASES
from app.stores.sqlite_unit import Unit

BUCKETS_PER_DOUBLING = 8
_BUCKET = "ms:"
_P95 = 0.95


def count_turn(unit: Unit, turn: Turn) -> None:
    """Count a turn that has ended."""
    for name, change in rules.counts_of(turn).items():
        unit.count(name, change)
    if turn.status is TurnStatus.FINISHED:
        unit.count("turns_finished", 1)
        unit.count("response_ms", turn.duration_ms)
        unit.count(f"{_BUCKET}{bucket_of(turn.duration_ms)}", 1)


def get_session_stats(connection: apsw.Connection) -> SessionStats:
    counts = Counter(dict[str, int](connection.execute("SELECT name, value FROM counters")))
    buckets = {
        int(name.removeprefix(_BUCKET)): count for name, count in counts.items() if name.startswith(_BUCKET)
    }
    phases = {phase.value: counts[phase.value] for phase in PHASES}
    same = ("created", "lifetime_ms", "turns", "turns_failed", "turns_finished", "response_ms")
    return SessionStats(
        total=counts["sessions"],
        tokens=counts["prompt_tokens"] + counts["completion_tokens"],
        p95_response_ms=percentile(buckets, _P95),
        **phases,
        **{name: counts[name] for name in same},
    )


def bucket_of(time_ms: int) -> int:
    """Return the bucket of a response time; 0 is for less than a millisecond."""
    return 1 + math.floor(BUCKETS_PER_DOUBLING * math.log2(time_ms)) if time_ms >= 1 else 0


def percentile(buckets: dict[int, int], share: float) -> int:
    """Return about the smallest time (ms) that at least this share of the counted ones kept to."""
    missing = math.ceil(share * sum(buckets.values()))
    for bucket in sorted(buckets):
        missing -= buckets[bucket]
        if missing <= 0:
            return round(2 ** ((bucket - 0.5) / BUCKETS_PER_DOUBLING)) if bucket else 0
    return 0
