"""A session's place in the pool, and the tickets of those who want it."""

from enum import StrEnum

from app.domain.errors import AgentPoolError
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.ports import LiveAgent

Choice = tuple[str, str, str]


class SlotState(StrEnum):
    """ABSENT is not a state: a session without a slot is not in the map."""

    WAITING = "waiting"  # for room; holds no place
    LOADING = "loading"  # holds a place; a task of the pool builds its agent
    IDLE = "idle"  # holds a place; may be evicted
    BUSY = "busy"  # holds a place; leased to ``owner``
    HELD = "held"  # exclusive to ``owner`` without an agent; holds no place


class TicketKind(StrEnum):
    TURN = "turn"
    HOLD = "hold"


class TicketState(StrEnum):
    WAITING = "waiting"
    GRANTED = "granted"
    DONE = "done"


class Ticket:
    """One caller's claim on a session: first a position in its queue, then the right to it.

    ``error`` says why a ticket that is done was refused. ``is_warm``: it was
    granted an agent that lived already.
    """

    __slots__ = ("error", "is_warm", "key", "kind", "slot", "state", "turn_id", "user")

    def __init__(
        self,
        key: SessionKey,
        kind: TicketKind = TicketKind.TURN,
        *,
        user: str | None = None,
        turn_id: str | None = None,
    ) -> None:
        self.key = key
        self.kind = kind
        self.user = user
        self.turn_id = turn_id
        self.state = TicketState.WAITING
        self.slot: Slot | None = None
        self.error: AgentPoolError | None = None
        self.is_warm = False

    def __repr__(self) -> str:
        return f"<Ticket {self.kind} {self.turn_id or ''} {self.state}>"


class Slot:
    """One session's place. The per-session lock *is* the slot: ``owner`` holds it.

    ``record`` is the session as the load that built ``agent`` read it, kept until its first
    turn ends, and ``loaded_for`` the ticket that was first in line when that load began.
    ``choice`` is the (agent_id, provider, model) that the agent was built for.
    ``waits_for_room`` counts the times that it queued for room, so that a late
    timer of an earlier wait can be told from the present one.
    Times are seconds on the monotonic clock.
    """

    __slots__ = (
        "agent",
        "agent_bytes",
        "agent_since",
        "choice",
        "key",
        "last_used",
        "loaded_for",
        "owner",
        "record",
        "state",
        "turns",
        "user",
        "waiters",
        "waits_for_room",
    )

    def __init__(self, key: SessionKey, user: str | None, state: SlotState) -> None:
        self.key = key
        self.user = user
        self.state = state
        self.agent: LiveAgent | None = None
        self.agent_bytes = 0
        self.agent_since = 0.0
        self.choice: Choice | None = None
        self.record: Session | None = None
        self.loaded_for: Ticket | None = None
        self.owner: Ticket | None = None
        self.waiters: list[Ticket] = []  # short, and an empty deque takes 760 bytes per session
        self.last_used = 0.0
        self.turns = 0
        self.waits_for_room = 0

    def __repr__(self) -> str:
        return f"<Slot {self.key.session_id} {self.state} owner={self.owner} waiters={self.waiters}>"

    def idle_s(self, now: float) -> float:
        """How long the agent has been idle; 0 while it is not."""
        return max(0.0, now - self.last_used) if self.state is SlotState.IDLE else 0.0
