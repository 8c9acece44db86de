"""Finding a session or making it, in stores where that takes two steps."""

from typing import TYPE_CHECKING

from app.domain.errors import SessionExists, SessionNotFound
from app.domain.session import Session

if TYPE_CHECKING:
    from app.ports import SessionStore

TRIES = 5
"""How often somebody else may make and delete the session in between."""


class EnsuresInTwoSteps:
    """The part of a store that looks first, and makes only what is not there."""

    async def ensure_session(self: "SessionStore", session: Session) -> Session:
        for _ in range(TRIES):
            found = await self.find_session(session.key)
            if found is not None:
                return found
            try:
                await self.create_session(session)
                return session
            except SessionExists:
                continue
        raise SessionNotFound(session_id=session.key.session_id)
