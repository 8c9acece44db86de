"""The other processes of the same store."""

from collections.abc import Sequence
from typing import Protocol

from app.domain.erasure import ErasureNotice
from app.domain.ids import SessionKey
from app.domain.lease import Node
from app.domain.turn import CancelOrder, JsonObject


class Nodes(Protocol):
    """What processes ask each other, as far as they can be reached.

    Raises:
        NodeUnreachable: the node does not answer.
    """

    async def stats_of(self, node: Node) -> JsonObject:
        """Return what that node's ``GET /agent-stats`` says."""

    async def has_live(self, node: Node, key: SessionKey) -> bool:
        """Say whether the session has a live agent there."""

    async def turns_of(self, node: Node, key: SessionKey) -> tuple[str, ...]:
        """Return the session's turns in flight there; the one that runs comes first."""

    async def cancel(self, node: Node, key: SessionKey, order: CancelOrder) -> tuple[str, ...]:
        """Ask turns in flight there to end; return which were asked."""

    async def forget(self, node: Node, keys: Sequence[SessionKey], notice: ErasureNotice) -> None:
        """Tell of an erasure; end the turns of these sessions there, and drop what it has of gone ones."""
