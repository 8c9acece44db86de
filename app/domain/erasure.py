"""What is removed of a user, and the receipt for it."""

from dataclasses import dataclass, fields, replace

from app.domain.quota import Spent, UserKey


@dataclass(frozen=True, slots=True)
class Erased:
    """How much was removed. ``events`` are those that were logged beside turns."""

    sessions: int = 0
    turns: int = 0
    checkpoints: int = 0
    events: int = 0
    states: int = 0
    usage_days: int = 0

    def __add__(self, other: "Erased") -> "Erased":
        return Erased(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Erased)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """That nothing of the user was stored any more at ``erased_at``, in milliseconds."""

    receipt_id: str
    user_id: str
    erased_at: int
    erased: Erased


@dataclass(frozen=True, slots=True, kw_only=True)
class ErasureNotice:
    """What every process of a store is told of an erasure: first, while it goes on, and when it is done.

    For ``lasts_s`` no session of the user's is made, 0: from now on they may be again. ``spent`` is what
    counts for the user's limit today, ``None``: there is no limit.
    """

    owner: str
    user_id: str
    lasts_s: float
    spent: Spent | None = None

    @property
    def user(self) -> UserKey:
        return self.owner, self.user_id

    def done(self) -> "ErasureNotice":
        """Return that the store has forgotten the user."""
        return replace(self, lasts_s=0, spent=None if self.spent is None else replace(self.spent, stored=0))
