"""Chat: the whole turn."""

from dataclasses import dataclass, field
from enum import StrEnum

from app.domain.catalog import AgentProfile, ModelOffer
from app.domain.events import TerminalEvent, TurnEvent
from app.domain.ids import SessionKey
from app.domain.turn import Activation, JsonObject, Turn, Usage
from app.services.turns import TurnLog


class OnBusy(StrEnum):
    QUEUE = "queue"
    REJECT = "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    message: str
    session_id: str | None = None
    owner: str = ""
    user_id: str | None = None
    window_id: str | None = None
    app_name: str | None = None
    agent_id: str | None = None
    provider: str | None = None
    model: str | None = None
    params: JsonObject | None = None
    metadata: JsonObject = field(default_factory=dict)
    on_busy: OnBusy = OnBusy.QUEUE


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply:
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


class Flight:
    turn_id: str
    key: SessionKey
    log: TurnLog

    async def wait_started(self) -> None: ...
    async def wait_ended(self) -> TerminalEvent: ...


@dataclass(frozen=True, slots=True)
class ActiveTurns:
    turn: Turn | None
    waiting: tuple[str, ...]


class ChatService:
    async def begin(self, request: ChatRequest) -> Flight: ...
    def leave(self, flight: Flight) -> None: ...
    async def chat(self, session_id: str, message: str) -> ChatReply: ...
    def reply_of(self, flight: Flight) -> ChatReply: ...
    async def watch(self, key: SessionKey, turn_id: str, user_id: str | None = None) -> TurnLog | list[tuple[int, TurnEvent]]: ...
    async def cancel(self, key: SessionKey, *, turn_id: str | None = None, keep_partial: bool = True, all_turns: bool = False, user_id: str | None = None) -> str: ...
    async def active(self, key: SessionKey, user_id: str | None = None) -> ActiveTurns: ...
    def agents(self) -> tuple[AgentProfile, ...]: ...
    def models(self) -> tuple[ModelOffer, ...]: ...
