"""Who makes a request."""

from dataclasses import dataclass

from fastapi import Request


@dataclass(frozen=True, slots=True)
class Principal:
    """``owner`` is the first part of every session's address; ``""`` is the one namespace."""

    owner: str
    is_admin: bool


ANYONE = Principal(owner="", is_admin=True)


async def authenticate(_request: Request) -> Principal:
    """Return who asks. Nobody is asked for a credential (``AUTH_MODE=none``)."""
    return ANYONE
