"""What is removed of a user, and the receipt for it."""

from dataclasses import dataclass, fields


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
