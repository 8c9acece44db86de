"""Everything that can go wrong and that a caller may want to tell apart.

An error carries a stable ``code``, a sentence and the ids concerned; never an
HTTP number (``api.errors`` has the only table). The docstring is the default
sentence. No message ever repeats what a user sent.
"""

from typing import Any, ClassVar

from app.domain.lease import Holder, Node
from app.domain.quota import Quota


class AgentPoolError(Exception):
    """The request could not be carried out."""

    code: ClassVar[str] = "INTERNAL_ERROR"

    def __init__(
        self,
        detail: str | None = None,
        *,
        session_id: str | None = None,
        turn_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.detail = detail or (type(self).__doc__ or "").strip().partition("\n")[0]
        self.session_id = session_id
        self.turn_id = turn_id
        self.retry_after_s = retry_after_s
        super().__init__(self.detail)

    @property
    def extra(self) -> dict[str, Any]:
        """Further members that belong in the problem document."""
        return {}


class InternalError(AgentPoolError):
    """Something went wrong that is not the caller's fault; the log has the details."""


class InvalidInput(AgentPoolError):
    """A part of the request does not fit."""

    code = "VALIDATION_ERROR"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    @property
    def extra(self) -> dict[str, Any]:
        return {"errors": [{"field": self.field, "message": self.message}]}


class Unauthenticated(AgentPoolError):
    """A valid credential is needed."""

    code = "UNAUTHENTICATED"


class Forbidden(AgentPoolError):
    """This is for admins."""

    code = "FORBIDDEN"


class RateLimited(AgentPoolError):
    """This user has had as much as allowed for now.

    ``quota`` is what is used up.
    """

    code = "RATE_LIMITED"

    def __init__(self, detail: str | None = None, *, quota: Quota, **ids: Any) -> None:
        super().__init__(detail, **{"retry_after_s": quota.reset_s, **ids})
        self.quota = quota


class Overloaded(AgentPoolError):
    """The server has more to do than it can keep up with."""

    code = "OVERLOADED"


class SessionNotFound(AgentPoolError):
    """There is no such session."""

    code = "SESSION_NOT_FOUND"


class TurnNotFound(AgentPoolError):
    """There is no such turn in this session."""

    code = "TURN_NOT_FOUND"


class CheckpointNotFound(AgentPoolError):
    """There is no such checkpoint in this session."""

    code = "CHECKPOINT_NOT_FOUND"


class AgentNotFound(AgentPoolError):
    """There is no such agent."""

    code = "AGENT_NOT_FOUND"


class SessionExists(AgentPoolError):
    """A session with this id exists already."""

    code = "SESSION_EXISTS"


class SessionBusy(AgentPoolError):
    """A turn is running in this session."""

    code = "SESSION_BUSY"


class LeasedElsewhere(SessionBusy):
    """Another process has this session."""

    def __init__(self, holder: Holder, **ids: Any) -> None:
        super().__init__(turn_id=holder.turn_id, **ids)
        self.holder = holder


class LeaseReentered(AgentPoolError):
    """A turn asked for the lease of its own session, which would wait for itself for ever."""

    code = "SESSION_BUSY"


class TurnQueueFull(AgentPoolError):
    """Too many turns wait for this session, or this one waited too long."""

    code = "TURN_QUEUE_FULL"


class HeadMoved(AgentPoolError):
    """The session has moved on: its head is not the expected turn any more."""

    code = "HEAD_MOVED"


class PreconditionFailed(AgentPoolError):
    """The session has changed since its ETag was read."""

    code = "PRECONDITION_FAILED"


class NoActiveTurn(AgentPoolError):
    """No turn runs or waits in this session."""

    code = "NO_ACTIVE_TURN"


class IdempotencyMismatch(AgentPoolError):
    """This idempotency key was used for another request."""

    code = "IDEMPOTENCY_MISMATCH"


class KeyTaken(AgentPoolError):
    """Another process uses this idempotency key.

    ``holder`` has its turn, which runs; ``None``: that turn is committed.
    """

    code = "SESSION_BUSY"

    def __init__(self, holder: Holder | None, **ids: Any) -> None:
        super().__init__(**ids)
        self.holder = holder


class NodeUnreachable(AgentPoolError):
    """Another process has what is asked for, and does not answer.

    ``outcome_unknown``: a request that it was sent may have been carried out.
    """

    code = "NODE_UNREACHABLE"

    def __init__(self, node: Node, *, outcome_unknown: bool = False, **ids: Any) -> None:
        super().__init__(**{"retry_after_s": 1, **ids})
        self.node = node
        self.outcome_unknown = outcome_unknown

    @property
    def extra(self) -> dict[str, Any]:
        return {"outcome": "unknown"} if self.outcome_unknown else {}


class RunsElsewhere(NodeUnreachable):
    """Another process has what is asked for, and is to be asked; from here it cannot be.

    Faces send the request there, so that only programs without one ever see this.
    """


class SessionArchived(AgentPoolError):
    """The session is archived; set its status to active to go on."""

    code = "SESSION_ARCHIVED"


class SessionExpired(AgentPoolError):
    """The session has expired; set its status to active to go on."""

    code = "SESSION_EXPIRED"


class SessionLimit(AgentPoolError):
    """The user has as many sessions as allowed."""

    code = "SESSION_LIMIT"


class PoolExhausted(AgentPoolError):
    """Every live agent is busy and none came free in time."""

    code = "POOL_EXHAUSTED"


class Draining(AgentPoolError):
    """The server is shutting down and takes no new turns.

    Nothing was begun, unless it names a turn.
    """

    code = "DRAINING"


class UnknownModel(AgentPoolError):
    """This provider or model is not offered here."""

    code = "UNKNOWN_MODEL"


class ModelUnavailable(AgentPoolError):
    """The model does not answer."""

    code = "MODEL_UNAVAILABLE"


class ModelRateLimited(AgentPoolError):
    """The model's provider limits the rate of requests."""

    code = "MODEL_RATE_LIMITED"


class ModelError(AgentPoolError):
    """The model refused the request or its answer was malformed, cut off or empty."""

    code = "MODEL_ERROR"


class TurnTimeout(AgentPoolError):
    """The turn took longer than allowed."""

    code = "TURN_TIMEOUT"


class TurnCancelled(AgentPoolError):
    """The turn was cancelled."""

    code = "TURN_CANCELLED"


class TurnInterrupted(AgentPoolError):
    """The process died while the turn ran."""

    code = "INTERRUPTED"


class SnapshotUnreadable(AgentPoolError):
    """The stored session cannot be read; it is set aside and everything else goes on."""

    code = "SNAPSHOT_UNREADABLE"


class StoreUnavailable(AgentPoolError):
    """The database does not answer or is full."""

    code = "STORE_UNAVAILABLE"

    def __init__(self, detail: str | None = None, *, outcome_unknown: bool = False, **ids: Any) -> None:
        super().__init__(detail, **ids)
        self.outcome_unknown = outcome_unknown

    @property
    def extra(self) -> dict[str, Any]:
        return {"outcome": "unknown"} if self.outcome_unknown else {}


class StoreLocked(Exception):
    """Another process has this database open.

    Raised at start only, so it has no code.
    """
