"""State: key–value data of a session, of a user, or of an application.

A session's state belongs to its branch and lives in its record. That of users and
applications is shared by sessions, outlives them, and knows nothing of branches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from app.domain.errors import InvalidInput
from app.domain.free_object import check_free_object
from app.domain.session import merge_patch
from app.domain.turn import JsonObject

RESERVED_PREFIXES = ("temp:", "app:", "user:")
"""Keys that begin so would be mistaken for another scope's in the merged view; ``temp:`` is never stored."""


class StateScope(NamedTuple):
    """Whose state: of an application, or of one of its users."""

    app_name: str
    owner: str = ""
    user_id: str | None = None  # None: the application's, which has no owner


@dataclass(frozen=True, slots=True)
class SharedState:
    """The state of a user or an application. ``rev`` grows with each change; 0: there never was one."""

    values: JsonObject = field(default_factory=dict)
    rev: int = 0

    def patched(self, patch: Mapping[str, Any]) -> "SharedState":
        """Return it after the merge patch (RFC 7396).

        Raises:
            InvalidInput: it would be larger than a state may be.
        """
        return SharedState(patched_values(self.values, patch), self.rev + 1)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The shared state that a session's prompt may name."""

    app: SharedState = field(default_factory=SharedState)
    user: SharedState = field(default_factory=SharedState)

    @property
    def revs(self) -> tuple[int, int]:
        return self.app.rev, self.user.rev


def patched_values(values: JsonObject, patch: Mapping[str, Any]) -> JsonObject:
    """Return ``values`` after the merge patch.

    Raises:
        InvalidInput: the result would be larger than a state may be.
    """
    return check_free_object(merge_patch(values, patch), "state")


def check_keys(patch: Mapping[str, Any], field_name: str = "state") -> None:
    """Refuse keys that belong to another scope.

    Raises:
        InvalidInput: a key begins with a reserved prefix; ``field`` is the path to it.
    """
    for key in patch:
        if key.startswith(RESERVED_PREFIXES):
            raise InvalidInput(f"{field_name}.{key}", "must not begin with temp:, app: or user:")


def merged_view(session: JsonObject, surroundings: Surroundings) -> JsonObject:
    """Return all three in one: ``app:key`` and ``user:key`` for the shared ones, the session's bare."""
    return {
        **{f"app:{key}": value for key, value in surroundings.app.values.items()},
        **{f"user:{key}": value for key, value in surroundings.user.values.items()},
        **session,
    }
