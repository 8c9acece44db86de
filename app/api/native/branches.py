"""Branches: a session's head moved, its path copied, answered anew, summed up. No turn is rewritten."""

from typing import Annotated, Any, Self

from fastapi import APIRouter, Query, Response
from fastapi import Body as BodyParam
from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from app.api.departure import client_watched
from app.api.deps import CallDep, SessionKeyDep
from app.api.docs import WITH_BODY, problems
from app.api.etag import parse_expected_head
from app.api.native.chat import (
    FAILURES,
    REFUSALS,
    STREAM_DOC,
    HeadHeader,
    IdempotencyKeyHeader,
    note_turn,
    stream_answer,
    wait_reply,
)
from app.api.native.fields import Flag, FreeObject, SessionQuery, TurnIdField, check_alone
from app.api.native.redact import redact
from app.api.native.requests import ModelChoice, OnBusyBody, SessionName, TurnOptions
from app.api.native.responses import TURN_ID, ChatAnswer, SessionAnswer
from app.api.native.sessions import ETAG_DOC, NEW_DOC, answer, answer_new
from app.api.route import StrictRoute
from app.domain.branch import Back, HeadTarget, ToCheckpoint, ToTurn
from app.domain.chat import RegenerateRequest
from app.domain.compaction import Note
from app.domain.idempotency import parse_key
from app.domain.ids import SessionKey
from app.domain.session import Unset

router = APIRouter(route_class=StrictRoute, tags=["branches"])

MOVE_DOC: dict[str, Any] = {"headers": ETAG_DOC}
MOVE_EXAMPLES = {
    "queue": {"summary": "After the running turn", "value": {"on_busy": "queue"}},
    "reject": {"summary": "Only if no turn runs", "value": {"on_busy": "reject"}},
}
_HOLD_REFUSALS = (
    "SESSION_NOT_FOUND",
    "SESSION_BUSY",
    "TURN_QUEUE_FULL",
    "DRAINING",
    "SNAPSHOT_UNREADABLE",
    "STORE_UNAVAILABLE",
)
MOVE_REFUSALS = (*_HOLD_REFUSALS, "SESSION_ARCHIVED", "SESSION_EXPIRED", "HEAD_MOVED")
_REWIND_EXAMPLES = {
    "turns": {"summary": "Take the last turn back", "value": {"turns": 1}},
    "turn": {"summary": "To a turn of whatever branch", "value": {"turn_id": TURN_ID}},
}
_FORK_EXAMPLES = {
    "head": {"summary": "From the head", "value": {"session_id": "user_001-copy"}},
    "turn": {"summary": "From a turn", "value": {"turn_id": TURN_ID, "metadata": {"variant": "b"}}},
}
_REGENERATE_EXAMPLES = {
    "again": {"summary": "Once more, a little more freely", "value": {"params": {"temperature": 0.9}}},
    "model": {"summary": "By another model", "value": {"provider": "openai", "model": "gpt-5-mini"}},
}
_REGENERATE_DOC = {
    "description": "The answer; with `stream=true` the events of `POST /chat/stream`.",
    "content": STREAM_DOC["content"],
}


class RewindBody(OnBusyBody):
    """Where to: a turn, or so many turns back."""

    turn_id: TurnIdField | None = Field(
        default=None, description="A committed turn, of whatever branch.", examples=[TURN_ID]
    )
    turns: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Back by so many turns; by all of them to the beginning.", examples=[1]
    )

    @field_validator("turns")
    @classmethod
    def _one_place(cls, value: int | None, info: ValidationInfo) -> int | None:
        check_alone(value, info, "turn_id")
        return value

    @model_validator(mode="after")
    def _some_place(self) -> Self:
        if self.turn_id is None and self.turns is None:
            raise ValueError("must have turn_id or turns")
        return self

    def to_target(self) -> ToTurn | Back:
        return ToTurn(self.turn_id) if self.turns is None else Back(self.turns)


class ForkBody(SessionName):
    """Where the copy goes on from, and what it is; everything may be left out."""

    checkpoint_id: TurnIdField | None = Field(
        default=None, description="From this checkpoint.", examples=["0199c1f2-9a44-7c01-b2de-6f7a8b9c0d1e"]
    )
    turn_id: TurnIdField | None = Field(
        default=None, description="From this committed turn; neither id: from the head.", examples=[TURN_ID]
    )
    metadata: FreeObject | None = Field(
        default=None,
        description="Free data of the new session; left out, a copy.",
        examples=[{"variant": "b"}],
    )

    @field_validator("turn_id")
    @classmethod
    def _one_place(cls, value: str | None, info: ValidationInfo) -> str | None:
        check_alone(value, info, "checkpoint_id")
        return value

    def to_target(self) -> HeadTarget | None:
        if self.checkpoint_id is not None:
            return ToCheckpoint(self.checkpoint_id)
        return None if self.turn_id is None else ToTurn(self.turn_id)


class RegenerateBody(TurnOptions, ModelChoice):
    """Who is to answer this time; everything may be left out."""

    def to_request(
        self,
        key: SessionKey,
        *,
        user_id: str | None,
        expected_head: str | Unset | None,
        idempotency_key: str | None,
    ) -> RegenerateRequest:
        return RegenerateRequest(
            session_id=key.session_id,
            owner=key.owner,
            user_id=user_id,
            agent_id=self.agent_id,
            provider=self.provider,
            model=self.model or self.model_name,
            params=None if self.params is None else self.params.to_json(),
            on_busy=self.to_on_busy(),
            on_disconnect=self.to_on_disconnect(),
            expected_head=expected_head,
            idempotency_key=idempotency_key,
        )


class RegenerateQuery(SessionQuery):
    """How the answer is to come."""

    stream: Flag = Field(default=False, description="As server-sent events.", examples=[False])


class CompactAnswer(BaseModel):
    """A summary that stands for the path up to a turn."""

    turn_id: str = Field(description="The last turn that it stands for.", examples=[TURN_ID])
    summary: str = Field(description="The summary.", examples=["The user is called 张三."])
    tokens_before: int = Field(
        description="What the context took without it, in tokens, estimated.", examples=[5200]
    )
    tokens_after: int = Field(description="What it takes with it.", examples=[180])

    @classmethod
    def of(cls, note: Note) -> "CompactAnswer":
        return cls(
            turn_id=note.turn_id,
            summary=note.summary,
            tokens_before=note.tokens_before,
            tokens_after=note.tokens_after,
        )


@router.post(
    "/sessions/{session_id}/rewind",
    summary="Move the head",
    responses={200: MOVE_DOC, **problems(*WITH_BODY, "TURN_NOT_FOUND", *MOVE_REFUSALS)},
)
async def rewind_session(
    key: SessionKeyDep,
    response: Response,
    call: CallDep,
    query: Annotated[SessionQuery, Query()],
    body: Annotated[RewindBody, BodyParam(openapi_examples=_REWIND_EXAMPLES)],
    if_match: HeadHeader = None,
) -> SessionAnswer:
    """Go on from an earlier turn, or one of another branch, with the state that was there.

    No turn is lost: those behind stay, beside the branch. Back by more turns than there are: 422.
    """
    async with client_watched(call.receive):
        view = await call.services.sessions.rewind(
            key,
            body.to_target(),
            on_busy=body.to_on_busy(),
            expected_head=parse_expected_head(if_match),
            user_id=query.user_id,
        )
    return answer(view, response)


@router.post(
    "/sessions/{session_id}/fork",
    summary="Copy a session",
    status_code=201,
    responses={
        201: {"headers": NEW_DOC},
        **problems(
            *WITH_BODY,
            "SESSION_NOT_FOUND",
            "TURN_NOT_FOUND",
            "CHECKPOINT_NOT_FOUND",
            "SESSION_EXISTS",
            "SESSION_BUSY",
            "SESSION_LIMIT",
            "SNAPSHOT_UNREADABLE",
            "STORE_UNAVAILABLE",
        ),
    },
)
async def fork_session(
    key: SessionKeyDep,
    response: Response,
    call: CallDep,
    query: Annotated[SessionQuery, Query()],
    body: Annotated[ForkBody | None, BodyParam(openapi_examples=_FORK_EXAMPLES)] = None,
) -> SessionAnswer:
    """A new session that goes on from a place of this one; the two never touch again.

    Its turns up to there keep their ids. A running turn is not waited for, and not part of it.
    """
    asked = body or ForkBody()
    metadata = asked.metadata
    view = await call.services.sessions.fork(
        key,
        asked.to_target(),
        session_id=asked.session_id or asked.conversation_id,
        metadata=metadata if metadata is None or not call.options.redact_keys else redact(metadata),
        user_id=query.user_id,
    )
    return answer_new(view, call, response)


@router.post(
    "/sessions/{session_id}/regenerate",
    summary="Answer the last message anew",
    response_model=ChatAnswer,
    responses={200: _REGENERATE_DOC, **problems(*WITH_BODY, *REFUSALS, *FAILURES)},
)
async def regenerate(
    key: SessionKeyDep,
    call: CallDep,
    query: Annotated[RegenerateQuery, Query()],
    body: Annotated[RegenerateBody | None, BodyParam(openapi_examples=_REGENERATE_EXAMPLES)] = None,
    idempotency_key: IdempotencyKeyHeader = None,
    if_match: HeadHeader = None,
) -> Response | ChatAnswer:
    """A sibling of the head turn: the same input, a new answer. The session's state stays as it is."""
    request = (body or RegenerateBody()).to_request(
        key,
        user_id=query.user_id,
        expected_head=parse_expected_head(if_match),
        idempotency_key=None if idempotency_key is None else parse_key(idempotency_key),
    )
    begun = await call.services.chat.begin_again(request)
    note_turn(begun, call)
    if query.stream:
        return await stream_answer(begun, call)
    return ChatAnswer.of(await wait_reply(begun, call))


@router.post(
    "/sessions/{session_id}/compact",
    summary="Sum a session up",
    responses=problems(
        *WITH_BODY,
        *_HOLD_REFUSALS,
        "TURN_NOT_FOUND",
        "AGENT_NOT_FOUND",
        "UNKNOWN_MODEL",
        "MODEL_UNAVAILABLE",
        "MODEL_RATE_LIMITED",
        "MODEL_ERROR",
        "TURN_TIMEOUT",
    ),
)
async def compact_session(
    key: SessionKeyDep,
    call: CallDep,
    query: Annotated[SessionQuery, Query()],
    body: Annotated[OnBusyBody | None, BodyParam(openapi_examples=MOVE_EXAMPLES)] = None,
) -> CompactAnswer:
    """Have the model sum up the conversation; from then on it is sent the summary in its place.

    Nothing that is stored is lost: head, counts and history stay. A failed summary changes nothing.
    """
    on_busy = (body or OnBusyBody()).to_on_busy()
    async with client_watched(call.receive):
        note = await call.services.chat.compact(key, on_busy=on_busy, user_id=query.user_id)
    return CompactAnswer.of(note)
