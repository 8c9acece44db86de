"""What is asked of a chat, and what it answers."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from app.domain.idempotency import Binding, fingerprint
from app.domain.session import UNSET, Session, SessionChange, Unset
from app.domain.turn import Activation, JsonObject, Turn, Usage


class OnBusy(StrEnum):
    """What a turn does when another one of its session runs."""

    QUEUE = "queue"  # waits for it
    REJECT = "reject"  # is refused
    INTERRUPT = "interrupt"  # cancels it and keeps what it has said
    ROLLBACK = "rollback"  # cancels it and drops what it has said


class OnDisconnect(StrEnum):
    """What becomes of a turn when its last watcher has gone."""

    CONTINUE = "continue"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """What goes with whatever makes a turn.

    ``agent_id``, ``provider``, ``model`` and ``params`` stick to the session when given.
    ``expected_head``: the head that the session must have when the turn starts.
    ``idempotency_key``: a repeat of the request with it gets the same turn.
    """

    owner: str = ""
    user_id: str | None = None
    agent_id: str | None = None
    provider: str | None = None
    model: str | None = None
    params: JsonObject | None = None
    on_busy: OnBusy = OnBusy.QUEUE
    on_disconnect: OnDisconnect = OnDisconnect.CONTINUE
    idempotency_key: str | None = None
    expected_head: str | Unset | None = UNSET

    @property
    def choices(self) -> "Choices":
        return Choices(self.agent_id, self.provider, self.model, self.params)

    def bind(self, *asked: Any) -> Binding | None:
        """Return the key and what makes another request with it the same one: that ``asked`` this."""
        if self.idempotency_key is None:
            return None
        chosen = (self.agent_id, self.provider, self.model, self.params)
        return Binding(self.owner, self.idempotency_key, fingerprint(*asked, *chosen))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(TurnRequest):
    """One message.

    ``window_id``, ``app_name`` and ``metadata`` count only if this message creates its session.
    ``parent``: the committed turn to continue from, or ``ROOT``; ``None`` is the head when the turn starts.
    """

    message: str
    session_id: str | None = None
    window_id: str | None = None
    app_name: str | None = None
    metadata: JsonObject = field(default_factory=dict)
    parent: str | None = None

    @property
    def binding(self) -> Binding | None:
        return self.bind("chat", self.session_id, self.message, self.parent, self.metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class RegenerateRequest(TurnRequest):
    """Another answer to the input of the head turn."""

    session_id: str

    @property
    def binding(self) -> Binding | None:
        return self.bind("regenerate", self.session_id)


@dataclass(frozen=True, slots=True)
class Choices:
    """What a turn chooses for itself and for those after it; ``None`` leaves it as it is then."""

    agent_id: str | None = None
    provider: str | None = None
    model: str | None = None
    params: JsonObject | None = None

    def change_of(self, session: Session) -> SessionChange | None:
        """Return what ``session`` has not yet, ``None`` if it has it all."""
        names = ("agent_id", "provider", "model", "params")
        given = {name: getattr(self, name) for name in names}
        changed = {name: v for name, v in given.items() if v is not None and v != getattr(session, name)}
        if "params" in changed:  # as a whole: what is not given any more goes back to the default
            changed["params"] = dict.fromkeys(session.params) | changed["params"]
        return SessionChange(**changed) if changed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply:
    """A finished turn. Durations are milliseconds, ``created_at`` milliseconds since the epoch."""

    session_id: str
    turn_id: str
    head: str
    reply: str
    finish_reason: str
    provider: str
    model: str
    agent_id: str
    usage: Usage
    message_count: int
    turn_count: int
    activation: Activation
    queued_ms: int
    duration_ms: int
    created_at: int


@dataclass(frozen=True, slots=True)
class ActiveTurns:
    """The running turn, ``None`` when turns only wait, and the ids of those that wait, in order."""

    turn: Turn | None
    waiting: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PastTurn:
    """A turn that had ended before it was asked for again with its idempotency key."""

    session_id: str
    turn: Turn
