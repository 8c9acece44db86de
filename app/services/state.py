"""State of sessions, users and applications."""

from app.domain.session import Session
from app.domain.state import SharedState, StateScope, check_keys, merged_view
from app.domain.turn import JsonObject
from app.pool.live import read_surroundings
from app.services.session_base import SessionBase, SessionRef, SessionView


class SessionStates(SessionBase):
    """The part of ``SessionManager`` that keeps key–value data; patches are those of RFC 7396."""

    async def get_state(self, ref: SessionRef, user_id: str | None = None) -> Session:
        """Return the session, whose ``state`` is that of its current branch.

        Raises:
            SessionNotFound
        """
        return await self._get(ref, user_id)

    async def patch_state(
        self,
        ref: SessionRef,
        patch: JsonObject,
        *,
        expected_rev: int | None = None,
        user_id: str | None = None,
    ) -> Session:
        """Merge ``patch`` into the session's state in one step; it counts from the next turn that starts.

        ``expected_rev`` is the ``state_rev`` that the session must have.

        Raises:
            SessionNotFound, PreconditionFailed
            InvalidInput: a key has a reserved prefix, or the state would be too large.
        """
        check_keys(patch)
        session = await self._get(ref, user_id)
        now = self._admission.clock.now_ms()
        return await self._store.patch_state(session.key, patch, now, expected_rev=expected_rev)

    async def merged_state(
        self, ref: SessionRef, user_id: str | None = None
    ) -> tuple[SessionView, JsonObject]:
        """Return the session and one object of all that its prompt may name.

        Keys of its application are ``app:key`` there, its user's ``user:key``, its own bare.

        Raises:
            SessionNotFound
        """
        session = await self._get(ref, user_id)
        return self._view(session), merged_view(session.state, await read_surroundings(self._store, session))

    async def get_shared(self, scope: StateScope) -> SharedState:
        """Return the state of a user or an application; it outlives every session."""
        return await self._store.get_shared(scope)

    async def patch_shared(
        self, scope: StateScope, patch: JsonObject, *, expected_rev: int | None = None
    ) -> SharedState:
        """Merge ``patch`` into the state of a user or an application in one step.

        Raises:
            PreconditionFailed: its revision is not ``expected_rev``.
            InvalidInput: a key has a reserved prefix, or the state would be too large.
        """
        check_keys(patch)
        now = self._admission.clock.now_ms()
        return await self._store.patch_shared(scope, patch, now, expected_rev=expected_rev)
