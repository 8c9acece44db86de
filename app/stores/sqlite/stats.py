"""Statistics in SQLite: counters that every write keeps right in its own transaction."""

from collections import Counter

from app.domain.stats import SessionStats
from app.domain.turn import Turn, TurnStatus
from app.stores import rules
from app.stores.buckets import P95, PREFIX, bucket_of, percentile
from app.stores.sqlite.connection import Connection
from app.stores.sqlite.records import PHASES
from app.stores.sqlite.unit import Unit


def count_turn(unit: Unit, turn: Turn) -> None:
    """Count a turn that has ended."""
    for name, change in rules.counts_of(turn).items():
        unit.count(name, change)
    if turn.status is TurnStatus.FINISHED:
        unit.count("turns_finished", 1)
        unit.count("response_ms", turn.duration_ms)
        unit.count(f"{PREFIX}{bucket_of(turn.duration_ms)}", 1)


def get_session_stats(connection: Connection) -> SessionStats:
    counts = Counter(dict[str, int](connection.execute("SELECT name, value FROM counters")))
    buckets = {
        int(name.removeprefix(PREFIX)): count for name, count in counts.items() if name.startswith(PREFIX)
    }
    phases = {phase.value: counts[phase.value] for phase in PHASES}
    same = ("created", "lifetime_ms", "turns", "turns_failed", "turns_finished", "response_ms")
    return SessionStats(
        total=counts["sessions"],
        tokens=counts["prompt_tokens"] + counts["completion_tokens"],
        p95_response_ms=percentile(buckets, P95),
        **phases,
        **{name: counts[name] for name in same},
    )
