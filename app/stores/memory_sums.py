"""Sums in memory: what users' turns took, and what can be counted about all sessions."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from app.domain.session import LifeSpan, Session, SessionStatus
from app.domain.stats import DayUsage, SessionStats, UserUsage
from app.domain.turn import Turn, TurnStatus, Usage
from app.stores import rules

_NAMES = "turns", "prompt_tokens", "completion_tokens"
_P95 = 0.95


class Sums:
    """Counts what ends, also what is gone by now. Statuses are those of the last ``sweep``."""

    def __init__(self, life: LifeSpan) -> None:
        self._life = life
        self._counts: Counter[str] = Counter()
        self._response_ms: Counter[int] = Counter()  # how many finished turns took so long
        self._usage: dict[tuple[str, str | None], dict[int, Counter[str]]] = {}
        self._swept_at = 0
        self._expired: set[tuple[str, int | None]] = set()  # what the last sweep found expired, and when

    def count_created(self) -> None:
        self._counts["created"] += 1

    def count_removed(self, session: Session) -> None:
        self._counts["removed_lifetime_ms"] += _lifetime_ms(session)

    def count_turn(self, session: Session, turn: Turn) -> None:
        counts = rules.counts_of(turn)
        self._counts.update({name: counts[name] for name in (*_NAMES, "turns_failed")})
        self._day_of(session, rules.day_of(turn)).update({name: counts[name] for name in _NAMES})
        if turn.status is TurnStatus.FINISHED:
            self._response_ms[turn.duration_ms] += 1

    def count_usage(self, session: Session, usage: Usage, now: int) -> None:
        """Count tokens that no turn took."""
        day = self._day_of(session, now // rules.MS_PER_DAY)
        day.update(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)

    def usage_of(self, owner: str, user_id: str, limit: int) -> UserUsage:
        found = self._usage.get((owner, user_id), {})
        days = [DayUsage(day, *(found[day][name] for name in _NAMES)) for day in sorted(found, reverse=True)]
        turns, read, written = (sum(counts[name] for counts in found.values()) for name in _NAMES)
        return UserUsage(turns, read, written, tuple(days[:limit]))

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
            turns_finished=self._response_ms.total(),
            response_ms=sum(ms * count for ms, count in self._response_ms.items()),
            p95_response_ms=self._p95_response_ms(),
            tokens=self._counts["prompt_tokens"] + self._counts["completion_tokens"],
        )

    def _p95_response_ms(self) -> int:
        """Return the smallest time that at least 95 of 100 finished turns kept to."""
        missing = math.ceil(_P95 * self._response_ms.total())
        for ms in sorted(self._response_ms):
            missing -= self._response_ms[ms]
            if missing <= 0:
                return ms
        return 0

    def _day_of(self, session: Session, day: int) -> Counter[str]:
        user = session.key.owner, session.user_id
        return self._usage.setdefault(user, {}).setdefault(day, Counter())


def _lifetime_ms(session: Session) -> int:
    return session.last_accessed - session.created_at
