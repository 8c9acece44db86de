"""What belongs to a user and to no session of theirs, in memory."""

from abc import ABC, abstractmethod

from app.domain.erasure import Erased
from app.domain.state import SharedState, StateScope
from app.domain.stats import UserUsage
from app.stores.memory.sums import Sums


class MemoryUsers(ABC):
    """The part of ``MemoryStore`` that knows users."""

    _shared: dict[StateScope, SharedState]
    _sums: Sums

    @abstractmethod
    def _check_open(self) -> None: ...

    async def get_usage(self, owner: str, user_id: str, limit: int) -> UserUsage:
        self._check_open()
        return self._sums.usage_of(owner, user_id, limit)

    async def list_scopes(self, owner: str, user_id: str) -> tuple[StateScope, ...]:
        self._check_open()
        return tuple(sorted(scope for scope in self._shared if scope[1:] == (owner, user_id)))

    async def forget_user(self, owner: str, user_id: str) -> Erased:
        scopes = await self.list_scopes(owner, user_id)
        for scope in scopes:
            del self._shared[scope]
        return Erased(states=len(scopes), usage_days=self._sums.forget(owner, user_id))
