"""What belongs to a user, or to an agent profile, as a whole."""

from dataclasses import asdict
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Path, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from app.api.audit import note_deed, note_receipt
from app.api.deps import NAME_SCHEMA, AdminDep, CallDep, UserIdDep
from app.api.docs import problems
from app.api.native.cursor import open_cursor, seal_cursor
from app.api.native.export import MEDIA_TYPE, ExportResponse
from app.api.native.fields import NoQuery, PageQuery
from app.api.native.responses import TIME, TURN_ID, DeletedAnswer, SessionAnswer, Time
from app.api.native.times import to_time
from app.api.route import StrictRoute
from app.domain.erasure import Receipt
from app.domain.ids import parse_name
from app.domain.stats import DayUsage, UserUsage

MS_PER_DAY = 86_400_000

router = APIRouter(route_class=StrictRoute, tags=["sessions"])


class UsageCounts(BaseModel):
    """Turns and their tokens."""

    turns: int = Field(description="Turns that ended, failed ones too.", examples=[12])
    prompt_tokens: int = Field(description="Tokens that were read.", examples=[2100])
    completion_tokens: int = Field(description="Tokens that were written.", examples=[600])


class UsageDay(UsageCounts):
    """One day's."""

    date: str = Field(
        description="The day, in UTC.", examples=["2026-11-20"], json_schema_extra={"format": "date"}
    )


class UserUsageAnswer(UsageCounts):
    """A user's usage in total, with that of deleted sessions, and per day."""

    days: list[UsageDay] = Field(description="Days with turns, newest first, up to 366.")

    @classmethod
    def of(cls, usage: UserUsage) -> "UserUsageAnswer":
        days = [UsageDay(date=to_time(day.day * MS_PER_DAY)[:10], **_counts_of(day)) for day in usage.days]
        return cls(days=days, **_counts_of(usage))


class ErasedAnswer(BaseModel):
    """How much was removed."""

    sessions: int = Field(description="Sessions.", examples=[3])
    turns: int = Field(description="Their turns, failed ones too.", examples=[42])
    checkpoints: int = Field(description="Their checkpoints.", examples=[2])
    events: int = Field(description="What was logged of them beside turns.", examples=[5])
    states: int = Field(description="Applications in which the user had state.", examples=[1])
    usage_days: int = Field(description="Days of which the usage was counted.", examples=[7])


class ReceiptAnswer(BaseModel):
    """That nothing of the user is stored any more."""

    receipt_id: str = Field(description="The receipt's id, also in the audit log.", examples=[TURN_ID])
    user_id: str = Field(description="Who was erased.", examples=["alice"])
    erased_at: Time = Field(description="When that was done.", examples=[TIME])
    erased: ErasedAnswer = Field(description="What there was.")

    @classmethod
    def of(cls, receipt: Receipt) -> "ReceiptAnswer":
        return cls(
            receipt_id=receipt.receipt_id,
            user_id=receipt.user_id,
            erased_at=to_time(receipt.erased_at),
            erased=ErasedAnswer(**asdict(receipt.erased)),
        )


async def _agent_id(
    agent_id: Annotated[
        str,
        Path(description="The agent profile's id.", examples=["assistant"], json_schema_extra=NAME_SCHEMA),
    ],
) -> str:
    return parse_name(agent_id, "agent_id")


@router.get(
    "/users/{user_id}/sessions",
    summary="List a user's sessions",
    responses={
        200: {
            "headers": {
                "Link": {"description": 'The next page, as rel="next".', "schema": {"type": "string"}}
            }
        },
        **problems("STORE_UNAVAILABLE"),
    },
)
async def list_user_sessions(
    user_id: UserIdDep,
    response: Response,
    call: CallDep,
    query: Annotated[PageQuery, Query()],
) -> list[SessionAnswer]:
    """A user's sessions as a bare list, newest activity first; the next page is named in `Link`."""
    cursor = open_cursor(query.cursor, "of-user", user_id)
    page = await call.services.sessions.list(
        call.namespace.owner, user_id=user_id, limit=query.limit, cursor=cursor
    )
    next_cursor = seal_cursor(page.next_cursor, "of-user", user_id)
    if next_cursor is not None:
        following = urlencode({"limit": query.limit, "cursor": next_cursor})
        response.headers["Link"] = f'<{call.exchange.path}?{following}>; rel="next"'
    return [SessionAnswer.of(view) for view in page.views]


@router.delete(
    "/users/{user_id}/sessions",
    summary="Delete a user's sessions",
    responses=problems("STORE_UNAVAILABLE"),
)
async def delete_user_sessions(
    user_id: UserIdDep, call: CallDep, _query: Annotated[NoQuery, Query()]
) -> DeletedAnswer:
    """Delete every session of a user and all that belongs to them; running turns are cancelled."""
    deleted = await call.services.sessions.delete_all(call.namespace.owner, user_id=user_id)
    return DeletedAnswer(deleted=deleted)


@router.delete(
    "/users/{user_id}",
    summary="Erase a user",
    responses=problems("SESSION_BUSY", "STORE_UNAVAILABLE"),
)
async def erase_user(user_id: UserIdDep, call: CallDep, _query: Annotated[NoQuery, Query()]) -> ReceiptAnswer:
    """Remove all that is stored of a user: sessions with all that belongs to them, state, usage.

    Running turns are cancelled. What is counted of all users together stays. Erasing again removes
    nothing. Only the audit log keeps the receipt's id. Meanwhile the user's new sessions are refused
    with `SESSION_BUSY`. Where an admin erases, what was stored under this user id while the server asked
    for no credentials goes, too; where the user does it stays, since it may be somebody else's.
    """
    note_deed(call.request, user_id)  # whoever asks for it: nothing else tells of it afterwards
    receipt = await call.services.sessions.erase_user(
        call.namespace.owner, user_id, with_unowned=call.is_admin
    )
    note_receipt(call.request, receipt.receipt_id)
    return ReceiptAnswer.of(receipt)


@router.get(
    "/users/{user_id}/export",
    summary="Export a user's data",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "One JSON object a line. Its `kind` is `header` (the first), `session` (its "
            "turns, checkpoints, notes and events follow), `turn`, `checkpoint`, `note`, `event`, "
            "`user_state`, `usage`, `unreadable` (something of a session is broken), or `end` (the "
            "last; it counts the others, and is missing where the export was cut off).",
            "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        **problems("RATE_LIMITED", "STORE_UNAVAILABLE"),
    },
)
async def export_user(user_id: UserIdDep, call: CallDep, _query: Annotated[NoQuery, Query()]) -> Response:
    """All that is stored of a user, as lines of JSON.

    For an admin, what was stored under this user id while the server asked for no credentials follows:
    with a `usage` of its own. One export of a user is sent at a time, and few in all.
    """
    sessions = call.services.sessions
    export = sessions.export_user(call.namespace.owner, user_id, with_unowned=call.is_admin)
    return ExportResponse(export, user_id, sessions.now_ms())


@router.delete(
    "/agents/{agent_id}/sessions",
    summary="Delete an agent's sessions",
    dependencies=[AdminDep],
    responses=problems("STORE_UNAVAILABLE"),
)
async def delete_agent_sessions(
    agent_id: Annotated[str, Depends(_agent_id)], call: CallDep, _query: Annotated[NoQuery, Query()]
) -> DeletedAnswer:
    """Delete every session with this agent and all that belongs to them; running turns are cancelled."""
    deleted = await call.services.sessions.delete_all(call.namespace.listed, agent_id=agent_id)
    return DeletedAnswer(deleted=deleted)


@router.get(
    "/users/{user_id}/usage",
    summary="Sum up a user's usage",
    responses=problems("STORE_UNAVAILABLE"),
)
async def get_user_usage(
    user_id: UserIdDep, call: CallDep, _query: Annotated[NoQuery, Query()]
) -> UserUsageAnswer:
    """The user's turns and tokens, in total and per day; those of deleted sessions count, too."""
    return UserUsageAnswer.of(await call.services.sessions.usage(user_id, call.namespace.owner))


def _counts_of(usage: DayUsage | UserUsage) -> dict[str, int]:
    return {name: getattr(usage, name) for name in UsageCounts.model_fields}
