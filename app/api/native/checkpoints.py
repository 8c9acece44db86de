"""Checkpoints: names for places on a session's branch, and the way back to them."""

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Response
from fastapi import Body as BodyParam
from pydantic import BaseModel, Field

from app.api.departure import client_watched
from app.api.deps import CallDep, CheckpointIdDep, SessionKeyDep
from app.api.docs import WITH_BODY, problems
from app.api.etag import parse_expected_head
from app.api.native.branches import MOVE_DOC, MOVE_EXAMPLES, MOVE_REFUSALS
from app.api.native.chat import HeadHeader
from app.api.native.cursor import open_cursor, seal_cursor
from app.api.native.fields import Body, CheckpointData, PageQuery, SessionQuery, Title
from app.api.native.redact import redact
from app.api.native.requests import OnBusyBody
from app.api.native.responses import TIME, TURN_ID, DeletedAnswer, NextCursor, SessionAnswer, Time, Total
from app.api.native.sessions import answer
from app.api.native.times import to_time
from app.api.route import StrictRoute
from app.domain.checkpoint import Checkpoint, CheckpointPage

router = APIRouter(route_class=StrictRoute, tags=["checkpoints"])

CHECKPOINT_ID = "0199c1f2-9a44-7c01-b2de-6f7a8b9c0d1e"
_EXAMPLES = {
    "label": {"summary": "With a label", "value": {"label": "before the refund"}},
    "data": {"summary": "With data of one's own", "value": {"label": "step 3", "data": {"step": 3}}},
}
_SESSION_PROBLEMS = ("SESSION_NOT_FOUND", "SNAPSHOT_UNREADABLE", "STORE_UNAVAILABLE")


class CheckpointBody(Body):
    """What is kept with a checkpoint; everything may be left out."""

    label: Title | None = Field(
        default=None, description="A name for people, in one line.", examples=["before the refund"]
    )
    data: CheckpointData | None = Field(
        default=None,
        description="Free data: 256 KiB, 32 deep, 1,000 keys. Values under keys like `password` "
        "are redacted.",
        examples=[{"step": 3}],
    )


class CheckpointListQuery(PageQuery, SessionQuery):
    """A page of checkpoints."""


class CheckpointAnswer(BaseModel):
    """A name for a turn and the state at that moment."""

    checkpoint_id: str = Field(description="Its id.", examples=[CHECKPOINT_ID])
    turn_id: str | None = Field(
        description="The turn that it names; `null`: the beginning.", examples=[TURN_ID]
    )
    label: str | None = Field(description="A name for people.", examples=["before the refund"])
    data: dict[str, Any] = Field(description="Free data.", examples=[{"step": 3}])
    created_at: Time = Field(description="When it was made.", examples=[TIME])
    automatic: bool = Field(description="Whether the server made it by itself.", examples=[False])

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "CheckpointAnswer":
        return cls(
            checkpoint_id=checkpoint.checkpoint_id,
            turn_id=checkpoint.turn_id,
            label=checkpoint.label,
            data=checkpoint.data,
            created_at=to_time(checkpoint.created_at),
            automatic=checkpoint.automatic,
        )


class CheckpointList(BaseModel):
    """A page of checkpoints, newest first."""

    checkpoints: list[CheckpointAnswer] = Field(description="The checkpoints.")
    total: Total
    next_cursor: NextCursor

    @classmethod
    def of(cls, page: CheckpointPage, next_cursor: str | None) -> "CheckpointList":
        checkpoints = [CheckpointAnswer.of(checkpoint) for checkpoint in page.checkpoints]
        return cls(checkpoints=checkpoints, total=page.total, next_cursor=next_cursor)


class CheckpointMessage(BaseModel):
    """What was done with a checkpoint."""

    message: str = Field(description="What happened.", examples=["Checkpoint deleted"])
    checkpoint_id: str = Field(description="The checkpoint.", examples=[CHECKPOINT_ID])


@router.post(
    "/sessions/{session_id}/checkpoints",
    summary="Make a checkpoint",
    status_code=201,
    responses={
        201: {"headers": {"Location": {"description": "Its path.", "schema": {"type": "string"}}}},
        **problems(*WITH_BODY, *_SESSION_PROBLEMS),
    },
)
async def create_checkpoint(
    key: SessionKeyDep,
    response: Response,
    call: CallDep,
    query: Annotated[SessionQuery, Query()],
    body: Annotated[CheckpointBody | None, BodyParam(openapi_examples=_EXAMPLES)] = None,
) -> CheckpointAnswer:
    """Name the session's head and its state. A running turn is not waited for, and not part of it."""
    asked = body or CheckpointBody()
    data = asked.data or {}
    checkpoint = await call.services.sessions.create_checkpoint(
        key,
        label=asked.label,
        data=redact(data) if call.options.redact_keys else data,
        user_id=query.user_id,
    )
    path = f"/sessions/{key.session_id}/checkpoints/{checkpoint.checkpoint_id}"
    response.headers["Location"] = call.root_path + quote(path, safe="/:@~")
    return CheckpointAnswer.of(checkpoint)


@router.get(
    "/sessions/{session_id}/checkpoints",
    summary="List the checkpoints",
    responses=problems(*_SESSION_PROBLEMS),
)
async def list_checkpoints(
    key: SessionKeyDep, call: CallDep, query: Annotated[CheckpointListQuery, Query()]
) -> CheckpointList:
    """The session's checkpoints, newest first, automatic ones too."""
    cursor = open_cursor(query.cursor, "checkpoints", key.session_id)
    page = await call.services.sessions.list_checkpoints(
        key, limit=query.limit, cursor=cursor, user_id=query.user_id
    )
    return CheckpointList.of(page, seal_cursor(page.next_cursor, "checkpoints", key.session_id))


@router.delete(
    "/sessions/{session_id}/checkpoints",
    summary="Delete the checkpoints",
    responses=problems(*_SESSION_PROBLEMS),
)
async def clear_checkpoints(
    key: SessionKeyDep, call: CallDep, query: Annotated[SessionQuery, Query()]
) -> DeletedAnswer:
    """Delete all checkpoints of the session. Its turns stay."""
    return DeletedAnswer(deleted=await call.services.sessions.clear_checkpoints(key, query.user_id))


@router.get(
    "/sessions/{session_id}/checkpoints/latest",
    summary="Get the newest checkpoint",
    responses=problems("CHECKPOINT_NOT_FOUND", *_SESSION_PROBLEMS),
)
async def get_latest_checkpoint(
    key: SessionKeyDep, call: CallDep, query: Annotated[SessionQuery, Query()]
) -> CheckpointAnswer:
    """The newest checkpoint, automatic or not."""
    return CheckpointAnswer.of(await call.services.sessions.latest_checkpoint(key, query.user_id))


@router.get(
    "/sessions/{session_id}/checkpoints/{checkpoint_id:checkpoint}",
    summary="Get a checkpoint",
    responses=problems("CHECKPOINT_NOT_FOUND", *_SESSION_PROBLEMS),
)
async def get_checkpoint(
    key: SessionKeyDep, checkpoint_id: CheckpointIdDep, call: CallDep, query: Annotated[SessionQuery, Query()]
) -> CheckpointAnswer:
    """One checkpoint, with its data."""
    found = await call.services.sessions.get_checkpoint(key, checkpoint_id, query.user_id)
    return CheckpointAnswer.of(found)


@router.delete(
    "/sessions/{session_id}/checkpoints/{checkpoint_id:checkpoint}",
    summary="Delete a checkpoint",
    responses=problems("CHECKPOINT_NOT_FOUND", *_SESSION_PROBLEMS),
)
async def delete_checkpoint(
    key: SessionKeyDep, checkpoint_id: CheckpointIdDep, call: CallDep, query: Annotated[SessionQuery, Query()]
) -> CheckpointMessage:
    """Delete a checkpoint. Its turn stays."""
    await call.services.sessions.delete_checkpoint(key, checkpoint_id, query.user_id)
    return CheckpointMessage(message="Checkpoint deleted", checkpoint_id=checkpoint_id)


@router.post(
    "/sessions/{session_id}/checkpoints/{checkpoint_id}/restore",
    summary="Go back to a checkpoint",
    responses={200: MOVE_DOC, **problems(*WITH_BODY, "CHECKPOINT_NOT_FOUND", *MOVE_REFUSALS)},
)
async def restore_checkpoint(
    key: SessionKeyDep,
    checkpoint_id: CheckpointIdDep,
    response: Response,
    call: CallDep,
    query: Annotated[SessionQuery, Query()],
    body: Annotated[OnBusyBody | None, BodyParam(openapi_examples=MOVE_EXAMPLES)] = None,
    if_match: HeadHeader = None,
) -> SessionAnswer:
    """Move the head to the checkpoint's turn and bring back the state of that moment.

    No turn is lost: those behind stay, beside the branch.
    """
    async with client_watched(call.receive):
        view = await call.services.sessions.restore(
            key,
            checkpoint_id,
            on_busy=(body or OnBusyBody()).to_on_busy(),
            expected_head=parse_expected_head(if_match),
            user_id=query.user_id,
        )
    return answer(view, response)
