"""What the table decided and somebody has to do: its methods return these, in order."""

from dataclasses import dataclass

from app.domain.ids import SessionKey
from app.domain.stats import DiscardCause, EvictionCause
from app.pool.slot import Slot, Ticket


@dataclass(frozen=True, slots=True)
class Granted:
    """The session belongs to this ticket now."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Refused:
    """``ticket.error`` says why."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Load:
    """Build this slot's agent, then call ``loaded`` or ``load_failed``."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class AwaitRoom:
    """Call ``room_wait_over`` with these when the wait for room has lasted long enough."""

    slot: Slot
    wait_number: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """A live agent is gone."""

    key: SessionKey
    cause: EvictionCause | DiscardCause


Effect = Granted | Refused | Load | AwaitRoom | Dropped
