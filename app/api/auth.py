"""Who makes a request."""

from fastapi import Request

from app.domain.principal import ANYONE, Principal


async def authenticate(_request: Request) -> Principal:
    """Return who asks. Nobody is asked for a credential (``AUTH_MODE=none``)."""
    return ANYONE
