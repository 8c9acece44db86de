"""What counts requests for several processes, or for one."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Count:
    """``is_in``: it was within the limit, and has been counted. ``reset_s``: so long until there is more."""

    is_in: bool
    remaining: int
    reset_s: float


class RequestCounter(Protocol):
    """A sliding window for each user."""

    async def count(self, user_id: str, limit: int, window_s: int) -> Count:
        """Count one more, unless there were ``limit`` in the last ``window_s``.

        Raises:
            StoreUnavailable: what counts does not answer.
        """

    async def close(self) -> None: ...
