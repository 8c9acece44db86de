"""What an admin did, as the audit log keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

AUDIT_LOGGER = "agentpool.audit"
"""The logger that takes the records if there is no file for them."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One change: who, what, and what became of it. Nothing in it is secret.

    ``credential`` and ``user_id`` say who; ``action`` is a method and a route, or a command, and
    ``path`` what it was asked of; ``owner`` is the user who was named, ``None`` also if it were
    several. ``status`` is that of the answer, ``None`` if there was none; ``code`` that of the error.
    ``receipt_id`` is that of a user's erasure. ``sessions`` are those of a batch, by owner and id: the
    ones that were made, or that were to be deleted; if it failed, those that were to be made.
    ``choices`` say how an operator's change was to be done.
    """

    credential: str
    user_id: str | None
    action: str
    path: str | None = None
    owner: str | None = None
    session_id: str | None = None
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    receipt_id: str | None = None
    sessions: tuple[tuple[str, str | None], ...] = ()
    choices: Mapping[str, str | float] = field(default_factory=dict)
