"""Who has a session, where several processes use one store."""

from dataclasses import dataclass

LEASE_S = 30.0
"""How long a lease holds that nobody renews: as long as a process may pause without losing its turns."""


@dataclass(frozen=True, slots=True)
class Node:
    """A process that serves. ``url`` is where the others reach it, ``None`` if they cannot."""

    boot_id: str
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a session now: a turn of ``node``, whose id the nonce is, or what needs it to itself."""

    node: Node
    nonce: str
    is_turn: bool

    @property
    def turn_id(self) -> str | None:
        return self.nonce if self.is_turn else None
