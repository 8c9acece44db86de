"""What clients get: the answers of the native face."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from app.api.native.requests import StatusName
from app.api.native.times import to_optional_time, to_time
from app.domain.chat import ActiveTurns, ChatReply
from app.domain.errors import AgentPoolError
from app.domain.turn import Turn, TurnPage, TurnStatus
from app.domain.turn import Usage as TurnUsage
from app.services.sessions import History, SessionView, SessionViews

Time = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
Total = Annotated[int | None, Field(description="How many there are; `null` when counting costs too much.")]
NextCursor = Annotated[str | None, Field(description="Names the next page; `null` on the last.")]
TURN_ID = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"
TIME = "2026-11-20T10:00:00.000Z"


def is_none(value: object) -> bool:
    return value is None


class Usage(BaseModel):
    """Tokens as the provider counted them."""

    prompt_tokens: int = Field(description="Tokens that were read.", examples=[21])
    completion_tokens: int = Field(description="Tokens that were written.", examples=[6])
    total_tokens: int = Field(description="Both.", examples=[27])

    @classmethod
    def of(cls, usage: TurnUsage) -> "Usage":
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )


class ChatAnswer(BaseModel):
    """The answer to one message."""

    session_id: str = Field(description="The session.", examples=["user_001"])
    turn_id: str = Field(description="This turn.", examples=[TURN_ID])
    head: str = Field(description="The turn that the session stands on now.", examples=[TURN_ID])
    reply: str = Field(description="What the agent says.", examples=["你好张三！"])
    finish_reason: str = Field(description="Why it ended: `stop`, `length`, …", examples=["stop"])
    provider: str = Field(description="The model's provider.", examples=["openai"])
    model: str = Field(description="The model.", examples=["gpt-5-mini"])
    agent_id: str = Field(description="The agent profile.", examples=["assistant"])
    usage: Usage = Field(description="Tokens of this turn.")
    message_count: int = Field(description="Messages on the current branch.", examples=[2])
    turn_count: int = Field(description="Turns on the current branch.", examples=[1])
    activation: Literal["new", "warm", "restored"] = Field(
        description="Where the agent came from: made new, still live, or rebuilt from the store.",
        examples=["new"],
    )
    queued_ms: int = Field(description="How long the turn waited.", examples=[0])
    duration_ms: int = Field(description="How long it took.", examples=[812])
    created_at: Time = Field(description="When it started.", examples=[TIME])

    @classmethod
    def of(cls, reply: ChatReply) -> "ChatAnswer":
        return cls(**cls.members_of(reply))

    @staticmethod
    def members_of(reply: ChatReply) -> dict[str, Any]:
        """Return what the answer is made of, in its order: as JSON it is the answer's."""
        usage = reply.usage
        return {
            "session_id": reply.session_id,
            "turn_id": reply.turn_id,
            "head": reply.head,
            "reply": reply.reply,
            "finish_reason": reply.finish_reason,
            "provider": reply.provider,
            "model": reply.model,
            "agent_id": reply.agent_id,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.total_tokens,
            },
            "message_count": reply.message_count,
            "turn_count": reply.turn_count,
            "activation": reply.activation.value,
            "queued_ms": reply.queued_ms,
            "duration_ms": reply.duration_ms,
            "created_at": to_time(reply.created_at),
        }


class SessionAnswer(BaseModel):
    """A session: the durable conversation."""

    session_id: str = Field(description="Its id.", examples=["user_001"])
    app_name: str = Field(description="The application that it belongs to.", examples=["default"])
    user_id: str | None = Field(description="Whose it is.", examples=["alice"])
    window_id: str | None = Field(description="One of the user's windows.", examples=["desktop"])
    agent_id: str = Field(description="The agent profile.", examples=["assistant"])
    title: str | None = Field(description="A name for people.", examples=["你好，我叫张三"])
    status: StatusName = Field(description="Where it is in its life.", examples=["active"])
    created_at: Time = Field(description="When it was created.", examples=[TIME])
    updated_at: Time = Field(description="When its record last changed.", examples=[TIME])
    last_accessed: Time = Field(description="When it was last active.", examples=[TIME])
    expires_at: Time | None = Field(description="When it expires; `null`: never.", examples=[TIME])
    message_count: int = Field(description="Messages on the current branch.", examples=[2])
    turn_count: int = Field(description="Turns on the current branch.", examples=[1])
    head: str | None = Field(description="The turn that it stands on.", examples=[TURN_ID])
    provider: str = Field(description="The model's provider of the next turn.", examples=["openai"])
    model: str = Field(description="The model of the next turn.", examples=["gpt-5-mini"])
    params: dict[str, Any] = Field(description="How the model is to answer.", examples=[{"temperature": 0.2}])
    metadata: dict[str, Any] = Field(description="Free data.", examples=[{"language": "zh-CN"}])
    live: bool = Field(description="Whether its agent is in this process's pool now.", examples=[True])
    state: dict[str, Any] | None = Field(
        default=None,
        exclude_if=is_none,
        description="With `include=state`: the session's state, the user's as `user:key`, the application's "
        "as `app:key`.",
        examples=[{"language": "zh-CN", "user:name": "张三"}],
    )

    @classmethod
    def of(cls, view: SessionView, state: dict[str, Any] | None = None) -> "SessionAnswer":
        session = view.session
        return cls(
            session_id=session.key.session_id,
            app_name=session.app_name,
            user_id=session.user_id,
            window_id=session.window_id,
            agent_id=session.agent_id,
            title=session.title,
            status=view.status.value,
            created_at=to_time(session.created_at),
            updated_at=to_time(session.updated_at),
            last_accessed=to_time(session.last_accessed),
            expires_at=to_optional_time(session.expires_at),
            message_count=session.message_count,
            turn_count=session.turn_count,
            head=session.head,
            provider=view.provider,
            model=view.model,
            params=session.params,
            metadata=session.metadata,
            live=view.live,
            state=state,
        )


class SessionList(BaseModel):
    """A page of sessions, newest activity first."""

    sessions: list[SessionAnswer] = Field(description="The sessions.")
    total: Total
    next_cursor: NextCursor

    @classmethod
    def of(cls, page: SessionViews, next_cursor: str | None) -> "SessionList":
        sessions = [SessionAnswer.of(view) for view in page.views]
        return cls(sessions=sessions, total=page.total, next_cursor=next_cursor)


class SessionMessage(BaseModel):
    """What was done with a session."""

    message: str = Field(description="What happened.", examples=["Session deleted"])
    session_id: str = Field(description="The session.", examples=["user_001"])


class FieldErrorAnswer(BaseModel):
    """A part that does not fit."""

    field: str = Field(description="Where it stands.", examples=["session_id"])
    message: str = Field(description="What is allowed.", examples=["is a reserved word"])


class RefusalAnswer(BaseModel):
    """Why a session was not created."""

    code: str = Field(description="Names the kind of problem.", examples=["SESSION_EXISTS"])
    detail: str = Field(description="What happened.", examples=["A session with this id exists already."])
    errors: list[FieldErrorAnswer] | None = Field(
        default=None, exclude_if=is_none, description="Which parts of a malformed entry do not fit."
    )


class BatchResult(BaseModel):
    """What became of one entry: a session, or an error."""

    session_id: str | None = Field(
        default=None, exclude_if=is_none, description="The new session.", examples=["user_001"]
    )
    error: RefusalAnswer | None = Field(default=None, exclude_if=is_none, description="Why there is none.")

    @classmethod
    def of(cls, result: SessionView | AgentPoolError) -> "BatchResult":
        if isinstance(result, AgentPoolError):
            errors = result.extra.get("errors")
            return cls(error=RefusalAnswer(code=result.code, detail=result.detail, errors=errors))
        return cls(session_id=result.session.key.session_id)


class BatchAnswer(BaseModel):
    """What became of each entry, in their order."""

    results: list[BatchResult] = Field(description="One for each entry.")


class DeletedAnswer(BaseModel):
    """What became of many sessions."""

    deleted: int = Field(description="How many were deleted.", examples=[3])


class BatchDeletedAnswer(DeletedAnswer):
    """What became of the named sessions."""

    missing: int = Field(description="How many were not there.", examples=[0])


class HistoryMessage(BaseModel):
    """One message of the conversation."""

    role: Literal["user", "assistant"] = Field(description="Who says it.", examples=["user"])
    content: str = Field(description="The text.", examples=["你好，我叫张三"])
    turn_id: str = Field(description="Its turn.", examples=[TURN_ID])
    created_at: Time = Field(description="When it was said.", examples=[TIME])
    interrupted: Literal[True] | None = Field(
        default=None, exclude_if=is_none, description="The answer was cut off and kept."
    )


class HistoryAnswer(BaseModel):
    """A page of the current branch, ascending."""

    messages: list[HistoryMessage] = Field(description="The messages.")
    next_before: str | None = Field(description="`before` of the page before; `null` at the beginning.")

    @classmethod
    def of(cls, history: History) -> "HistoryAnswer":
        messages = [message for turn in history.turns for message in _messages(turn)]
        return cls(messages=messages, next_before=history.next_before)


class ErrorAnswer(BaseModel):
    """Why a turn failed."""

    code: str = Field(description="Names the kind of problem.", examples=["MODEL_UNAVAILABLE"])
    detail: str = Field(description="What happened.", examples=["The model does not answer."])


class TurnAnswer(BaseModel):
    """One turn: an input and everything until it ended."""

    turn_id: str = Field(description="Its id.", examples=[TURN_ID])
    parent: str | None = Field(description="The turn before it.", examples=[None])
    status: Literal["running", "finished", "failed", "cancelled"] = Field(
        description="How it went.", examples=["finished"]
    )
    input: str = Field(description="What the person said.", examples=["你好，我叫张三"])
    reply: str | None = Field(description="What the agent said.", examples=["你好张三！"])
    usage: Usage = Field(description="Tokens of this turn.")
    error: ErrorAnswer | None = Field(description="Why it failed.", examples=[None])
    started_at: Time = Field(description="When it started.", examples=[TIME])
    finished_at: Time | None = Field(description="When it ended.", examples=[TIME])
    on_branch: bool = Field(description="Whether it is part of the current branch.", examples=[True])

    @classmethod
    def of(cls, turn: Turn) -> "TurnAnswer":
        return cls.model_validate(_turn_members(turn))


class TurnList(BaseModel):
    """A page of turns, newest first; failed ones too."""

    turns: list[TurnAnswer] = Field(description="The turns.")
    total: Total
    next_cursor: NextCursor

    @classmethod
    def of(cls, page: TurnPage, next_cursor: str | None) -> "TurnList":
        turns = [TurnAnswer.of(turn) for turn in page.turns]
        return cls(turns=turns, total=page.total, next_cursor=next_cursor)


class ActiveAnswer(BaseModel):
    """The running turn, all ``null`` when turns only wait, and those that wait, in order."""

    turn_id: str | None = Field(default=None, description="Its id.", examples=[TURN_ID])
    parent: str | None = Field(default=None, description="The turn before it.")
    status: str | None = Field(default=None, description="`running`.", examples=["running"])
    input: str | None = Field(default=None, description="What the person said.")
    reply: str | None = Field(default=None, description="Always `null`: watch its stream.")
    usage: Usage | None = Field(default=None, description="Tokens of this turn.")
    error: ErrorAnswer | None = Field(default=None, description="Always `null`.")
    started_at: Time | None = Field(default=None, description="When it started.", examples=[TIME])
    finished_at: Time | None = Field(default=None, description="Always `null`.")
    on_branch: bool | None = Field(default=None, description="Not before it has ended.", examples=[False])
    waiting: list[str] = Field(description="The ids of the turns that wait, in order.", examples=[[]])

    @classmethod
    def of(cls, active: ActiveTurns) -> "ActiveAnswer":
        members = {} if active.turn is None else _turn_members(active.turn)
        return cls.model_validate({**members, "waiting": list(active.waiting)})


class CancelAnswer(BaseModel):
    """The turn that is being cancelled."""

    turn_id: str = Field(description="Its id.", examples=[TURN_ID])


def _messages(turn: Turn) -> tuple[HistoryMessage, HistoryMessage]:
    asked = HistoryMessage(
        role="user", content=turn.input, turn_id=turn.turn_id, created_at=to_time(turn.started_at)
    )
    answered = HistoryMessage(
        role="assistant",
        content=turn.reply or "",
        turn_id=turn.turn_id,
        created_at=to_time(turn.finished_at or turn.started_at),
        interrupted=True if turn.status is TurnStatus.CANCELLED else None,
    )
    return asked, answered


def _turn_members(turn: Turn) -> dict[str, Any]:
    error = turn.error
    return {
        "turn_id": turn.turn_id,
        "parent": turn.parent,
        "status": turn.status.value,
        "input": turn.input,
        "reply": turn.reply,
        "usage": Usage.of(turn.usage),
        "error": None if error is None else ErrorAnswer(code=error.code, detail=error.detail),
        "started_at": to_time(turn.started_at),
        "finished_at": to_optional_time(turn.finished_at),
        "on_branch": turn.on_branch,
    }
