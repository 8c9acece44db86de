"""What a turn holds while it runs: exclusive, bounded, dead once returned."""

from collections.abc import Callable

from app.domain.errors import InternalError
from app.domain.session import Session
from app.domain.stats import DiscardCause
from app.domain.turn import Activation
from app.pool.live import Activator
from app.pool.slot import Slot, Ticket
from app.ports import LiveAgent

GiveUp = Callable[[Ticket, DiscardCause | None], None]
Abandon = Callable[[Ticket, DiscardCause], Callable[[], None]]


class Lease:
    """The right to one session's live agent until ``give_back``, ``discard`` or ``abandon``.

    Returning is a plain call, so that no cancellation can get between; the first
    one counts and later ones do nothing. Afterwards ``agent`` raises.
    ``activation`` says where the agent came from.
    ``record`` is the session as a load for this very turn read it, else ``None``: a
    record that was read before the turn came may be older than what its caller knows.
    """

    __slots__ = ("_abandon", "_activator", "_agent", "_give_up", "_slot", "_ticket", "activation", "record")

    def __init__(
        self, ticket: Ticket, slot: Slot, activator: Activator, give_up: GiveUp, abandon: Abandon
    ) -> None:
        assert slot.agent is not None
        self._ticket = ticket
        self._slot = slot
        self._activator = activator
        self._give_up = give_up
        self._abandon = abandon
        self._agent: LiveAgent | None = slot.agent
        self.record: Session | None = slot.record if slot.loaded_for is ticket else None
        self.activation = Activation.WARM if ticket.is_warm else _activation_of(slot.agent)

    @property
    def agent(self) -> LiveAgent:
        """The live agent.

        Raises:
            InternalError: the lease was returned.
        """
        if self._agent is None:
            raise InternalError("the lease has been returned")
        return self._agent

    async def fit(self, session: Session) -> LiveAgent:
        """Bring the agent to the state of ``session`` (prompt, model, head) and return it.

        Raises:
            SnapshotUnreadable, StoreUnavailable, AgentNotFound, UnknownModel: the agent is as before.
            InternalError: the lease was returned, maybe in the meantime.
        """
        fitting = await self._activator.fit(self.agent, session)
        if fitting is not self.agent:
            self._agent = self._slot.agent = fitting
            self.activation = _activation_of(fitting)
        self._slot.choice = self._activator.choice_of(session)
        return fitting

    def give_back(self) -> None:
        """Return a clean agent: its turn has been committed, or it has not been touched."""
        self._end(None)

    def discard(self, cause: DiscardCause) -> None:
        """Return the session without the agent, which may be wrong."""
        self._end(cause)

    def abandon(self, cause: DiscardCause) -> Callable[[], None]:
        """Return the session while the agent's body still runs and ignores its cancellation.

        Call the result when that body has ended: until then it keeps its place.
        """
        if self._agent is None:
            return lambda: None
        self._agent = None
        return self._abandon(self._ticket, cause)

    def _end(self, cause: DiscardCause | None) -> None:
        if self._agent is not None:
            self._agent = None
            self._give_up(self._ticket, cause)


def _activation_of(agent: LiveAgent) -> Activation:
    return Activation.NEW if agent.stamp.head is None else Activation.RESTORED
