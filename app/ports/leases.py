"""Who has which session, where several processes use one store."""

from collections.abc import Sequence
from typing import Protocol

from app.domain.ids import SessionKey
from app.domain.lease import Holder, Node


class SessionLeases(Protocol):
    """One process at a time has a session: for a turn, or to have it to itself.

    A lease saves money: no two turns of a session pay a model at once. It does not save
    data: that is done by the commit, which compares the head, with whatever lease.
    A lease is a nonce and an end by the store's own clock. Turns take theirs with
    ``SessionStore.start_turn`` under their id, and ``commit_turn`` and ``record_turn`` give it back.
    A lease that has run out is as good as none: whoever takes the session ends, in the same
    step, the turn that it was for (``INTERRUPTED``), and so does ``reap``.
    Every method may raise ``StoreUnavailable`` and may be repeated.
    """

    @property
    def duration_s(self) -> float:
        """How long a lease holds that nobody renews."""

    async def take(self, key: SessionKey, nonce: str) -> None:
        """Have the session, of which there need not be one, to oneself.

        Raises:
            LeasedElsewhere: somebody else has it.
        """

    async def renew(self, held: Sequence[tuple[SessionKey, str]]) -> tuple[bool, ...]:
        """Let these leases hold for ``duration_s`` from now, in one round trip; say for each whether it does.

        One that ran out and that nobody has taken since, nor ended the turn of, is taken again.
        ``False``: it is lost, and so is the turn.
        """

    async def give_back(self, key: SessionKey, nonce: str) -> None:
        """Give the session back, and wake who waits for it; does nothing if it is not held under ``nonce``.

        A start record under ``nonce`` that has not ended is removed with its idempotency key,
        as though it never was.
        """

    async def holder(self, key: SessionKey) -> Holder | None:
        """Return who has the session."""

    async def wait_free(self, key: SessionKey, limit_s: float) -> None:
        """Return soon after the session is given back, or run out, and after ``limit_s`` at the latest.

        It may return early, and somebody else may have it by then. May be cancelled.
        """

    async def reap(self, limit: int) -> int:
        """End up to ``limit`` turns whose leases have run out; return how many."""

    async def announce(self) -> None:
        """Say that this process, ``open``'s boot, serves; to be repeated within ``duration_s``."""

    async def nodes(self) -> tuple[Node, ...]:
        """Return the processes that have announced themselves within ``duration_s``, this one too."""

    async def secret(self) -> str:
        """Return what the nodes know each other by; whoever asks first makes it, at random."""
