"""Who makes a request."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """``owner`` is the first part of every session's address; ``""`` is the one namespace."""

    owner: str
    is_admin: bool


ANYONE = Principal(owner="", is_admin=True)


async def authenticate() -> Principal:
    """Return who asks. Nobody is asked for a credential (``AUTH_MODE=none``)."""
    return ANYONE
