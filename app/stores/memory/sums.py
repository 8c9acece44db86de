"""Sums in memory: what users' turns took, and what can be counted about all sessions."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from app.domain.dump import UsageDump
from app.domain.session import LifeSpan, Session, SessionStatus
from app.domain.stats import DayUsage, SessionStats, UserUsage
from app.domain.turn import Turn, TurnStatus, Usage
from app.stores import rules
from app.stores.buckets import P95, PREFIX, bucket_of, percentile

_NAMES = "turns", "prompt_tokens", "completion_tokens"
_TOTALS = *_NAMES, "created", "turns_failed", "turns_finished", "response_ms"


class Sums:
    """Counts what ends, also what is gone by now. Statuses are those of the last ``sweep``."""

    def __init__(self, life: LifeSpan) -> None:
        self._life = life
        self._counts: Counter[str] = Counter()
        self._response_ms: Counter[int] = Counter()  # how many finished turns are in which bucket
        self._usage: dict[tuple[str, str | None], dict[int, Counter[str]]] = {}
        self._swept_at = 0
        self._expired: set[tuple[str, int | None]] = set()  # what the last sweep found expired, and when

    def count_created(self) -> None:
        self._counts["created"] += 1

    def count_removed(self, session: Session) -> None:
        self._counts["removed_lifetime_ms"] += _lifetime_ms(session)

    def count_replaced(self, session: Session) -> None:
        """Forget that a session was, which another takes the place of; it has been counted as removed."""
        self._counts["created"] -= 1
        self._counts["removed_lifetime_ms"] -= _lifetime_ms(session)

    def count_turn(self, session: Session, turn: Turn) -> None:
        counts = rules.counts_of(turn)
        self._counts.update({name: counts[name] for name in (*_NAMES, "turns_failed")})
        self._day_of(session, rules.day_of(turn)).update({name: counts[name] for name in _NAMES})
        if turn.status is TurnStatus.FINISHED:
            self._counts.update(turns_finished=1, response_ms=turn.duration_ms)
            self._response_ms[bucket_of(turn.duration_ms)] += 1

    def count_usage(self, session: Session, usage: Usage, now: int) -> None:
        """Count tokens that no turn took."""
        day = self._day_of(session, now // rules.MS_PER_DAY)
        day.update(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)

    def usage_of(self, owner: str, user_id: str, limit: int) -> UserUsage:
        found = self._usage.get((owner, user_id), {})
        days = [DayUsage(day, *(found[day][name] for name in _NAMES)) for day in sorted(found, reverse=True)]
        turns, read, written = (sum(counts[name] for counts in found.values()) for name in _NAMES)
        return UserUsage(turns, read, written, tuple(days[:limit]))

    def forget(self, owner: str, user_id: str) -> int:
        """Forget a user's usage, which stays in the totals; return on how many days there was some."""
        return len(self._usage.pop((owner, user_id), ()))

    def sweep(self, sessions: Iterable[Session], now: int) -> int:
        """Bring the statuses up to ``now``; return how many sessions have expired since the last time."""
        expired = {
            (s.uid, s.expires_at) for s in sessions if s.status_at(now, self._life) is SessionStatus.EXPIRED
        }
        fresh = len(expired - self._expired)
        self._swept_at, self._expired = now, expired
        return fresh

    def stats(self, sessions: Sequence[Session]) -> SessionStats:
        status = Counter(session.status_at(self._swept_at, self._life) for session in sessions)
        living_ms = sum(map(_lifetime_ms, sessions))
        return SessionStats(
            total=len(sessions),
            active=status[SessionStatus.ACTIVE],
            idle=status[SessionStatus.IDLE],
            archived=status[SessionStatus.ARCHIVED],
            expired=status[SessionStatus.EXPIRED],
            created=self._counts["created"],
            lifetime_ms=self._counts["removed_lifetime_ms"] + living_ms,
            turns=self._counts["turns"],
            turns_failed=self._counts["turns_failed"],
            turns_finished=self._counts["turns_finished"],
            response_ms=self._counts["response_ms"],
            p95_response_ms=percentile(self._response_ms, P95),
            tokens=self._counts["prompt_tokens"] + self._counts["completion_tokens"],
        )

    def dump_usage(self) -> Iterator[UsageDump]:
        """Yield what each user's turns took, in ascending order."""
        named = ((owner, user_id) for owner, user_id in self._usage if user_id is not None)
        for owner, user_id in sorted(named):
            for day, counts in sorted(self._usage[owner, user_id].items()):
                yield UsageDump(owner, user_id, DayUsage(day, *(counts[name] for name in _NAMES)))

    def dump_totals(self) -> dict[str, int]:
        """Return the totals of a ``RestDump``, but for ``created``, which counts all."""
        buckets = {f"{PREFIX}{bucket}": count for bucket, count in self._response_ms.items()}
        lifetime_ms = self._counts["removed_lifetime_ms"]
        return {name: self._counts[name] for name in _TOTALS} | {"lifetime_ms": lifetime_ms} | buckets

    def load(self, usage: Iterable[UsageDump], totals: dict[str, int]) -> None:
        """Put usage and totals, as ``dump_totals`` has them, in the place of what was counted."""
        self._usage.clear()
        for dumped in usage:
            day = dumped.usage
            took = {name: getattr(day, name) for name in _NAMES}
            self._usage.setdefault((dumped.owner, dumped.user_id), {})[day.day] = Counter(took)
        self._counts = Counter({name: totals.get(name, 0) for name in _TOTALS})
        self._counts["removed_lifetime_ms"] = totals.get("lifetime_ms", 0)
        buckets = {name: count for name, count in totals.items() if name.startswith(PREFIX)}
        self._response_ms = Counter(
            {int(name.removeprefix(PREFIX)): count for name, count in buckets.items()}
        )

    def _day_of(self, session: Session, day: int) -> Counter[str]:
        user = session.key.owner, session.user_id
        return self._usage.setdefault(user, {}).setdefault(day, Counter())


def _lifetime_ms(session: Session) -> int:
    return session.last_accessed - session.created_at
