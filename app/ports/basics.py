"""Clocks, ids, and who is told what the pool did."""

from collections.abc import Callable
from typing import Protocol

from app.domain.ids import SessionKey
from app.domain.stats import DiscardCause, EvictionCause

NewId = Callable[[], str]
"""Makes a fresh UUIDv7 in text: unique, and later ones sort behind earlier ones."""


class Clock(Protocol):
    def now_ms(self) -> int:
        """Return the wall clock, milliseconds since the epoch: for what is shown and stored."""

    def monotonic(self) -> float:
        """Return seconds that never go backwards: for every interval."""


class PoolObserver(Protocol):
    """Hears what the pool did; never waits, never raises."""

    def evicted(self, key: SessionKey, cause: EvictionCause) -> None: ...
    def discarded(self, key: SessionKey, cause: DiscardCause) -> None: ...
    def zombie_appeared(self, key: SessionKey) -> None: ...
