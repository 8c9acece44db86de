"""Who goes first in a session: what waits for the running turn, and what cancels it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from app.domain.chat import OnBusy
from app.domain.ids import SessionKey
from app.domain.turn import CancelReason
from app.pool.manager import AgentManager
from app.services.ownership import Manners, Ownership
from app.services.turns import Turns

INTERRUPTS = {OnBusy.INTERRUPT: CancelReason.INTERRUPT, OnBusy.ROLLBACK: CancelReason.ROLLBACK}
"""Why a turn is cancelled by what does not wait for it."""


@dataclass(frozen=True, slots=True)
class Holds:
    """Holds of sessions, in the same queue as their turns."""

    pool: AgentManager
    turns: Turns
    ownership: Ownership = field(default_factory=Ownership)

    @asynccontextmanager
    async def hold(self, key: SessionKey, on_busy: OnBusy = OnBusy.QUEUE) -> AsyncIterator[None]:
        """Have the session to oneself; while a turn of it runs do as ``on_busy`` says.

        Raises:
            SessionBusy, TurnQueueFull, Draining: no hold within the bounds.
        """
        reason = INTERRUPTS.get(on_busy)
        async with self.pool.hold(
            key,
            may_wait=on_busy is not OnBusy.REJECT,
            front=reason is not None,
            on_entered=partial(self.make_way, key, reason),
        ):
            manners = Manners(on_busy is not OnBusy.REJECT, reason)
            async with self.ownership.hold(key, manners):
                yield

    def make_way(self, key: SessionKey, reason: CancelReason | None, turn_id: str | None = None) -> None:
        """Cancel the turn that has the session for ``reason``, if there is one; one that commits has won.

        Called by what interrupts (the turn ``turn_id``, or a hold) when it is next in line, so that
        the one cancelled is the one waited for.
        """
        owner = self.pool.owner_of(key)
        if reason is not None and owner not in (None, turn_id):
            other = self.turns.get(owner)
            if other is not None:
                other.cancel(reason, keep_partial=reason is CancelReason.INTERRUPT)
