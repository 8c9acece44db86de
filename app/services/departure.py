"""What a turn sets out with, and where it then begins."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from app.domain.chat import Choices
from app.domain.idempotency import Binding
from app.domain.session import UNSET, Session, Unset
from app.domain.turn import CancelReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """What a turn sets out with.

    ``message`` ``None``: the head turn's input once more, beside that turn.
    ``parent``: the committed turn that it continues, ``ROOT``, or ``None`` for the head as it is then.
    ``choices`` stick to the session as it is when the turn starts.
    ``user`` is whose share of the pool it takes.
    ``may_wait``: whether it waits for a turn of its session that runs.
    ``interrupts``: it cancels that turn for this reason instead, and goes before all that wait.
    ``expected_head``: it is refused if the session's head is another one by then.
    ``binding``: the idempotency key that is stored with it.
    ``seek`` finds the session, or makes it, if the one that was meant turns out to be gone.
    """

    message: str | None
    choices: Choices
    parent: str | None = None
    user: str | None = None
    may_wait: bool = True
    interrupts: CancelReason | None = None
    expected_head: str | Unset | None = UNSET
    binding: Binding | None = None
    seek: Callable[[], Awaitable[Session]] | None = None


@dataclass(frozen=True, slots=True)
class Boarding:
    """What a turn begins with: the session as stored, and as it would be at the place that it continues."""

    session: Session
    place: Session
    message: str
    resets_state: bool = False
