"""A session's story: what happened in its turns and between them, in order."""

import re
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from app.api.deps import CallDep, SessionKeyDep
from app.api.docs import problems
from app.api.native.fields import Limit, SessionQuery, check_alone
from app.api.native.kinds import CLASS_OF_TYPE, Members, describe, to_json
from app.api.native.responses import TIME, TURN_ID, Time
from app.api.native.times import parse_time, to_time
from app.api.route import StrictRoute
from app.services.story import StoryEvent

router = APIRouter(route_class=StrictRoute, tags=["turns"])

_EVENT_ID = f"{TURN_ID}:1"
_EventId = Annotated[str, Field(min_length=1, max_length=128)]
_Since = Annotated[
    int, BeforeValidator(parse_time), WithJsonSchema({"type": "string", "format": "date-time"})
]

_TYPES = "|".join(re.escape(name) for name in CLASS_OF_TYPE)


class EventQuery(SessionQuery):
    """Which events: without a position the newest."""

    limit: Limit = Field(default=50, description="Most events of a page.", examples=[50])
    after: _EventId | None = Field(
        default=None, description="The next ones behind the event of this id.", examples=[_EVENT_ID]
    )
    before: _EventId | None = Field(
        default=None, description="The last ones before the event of this id.", examples=[_EVENT_ID]
    )
    since: _Since | None = Field(
        default=None, description="Only those of this time or later (RFC 3339).", examples=[TIME]
    )
    types: str | None = Field(
        default=None,
        max_length=1024,
        description="Only those of these types, separated by commas: "
        + ", ".join(f"`{name}`" for name in CLASS_OF_TYPE)
        + ".",
        examples=["turn.finished,turn.failed"],
        json_schema_extra={"pattern": f"^({_TYPES})(,({_TYPES}))*$"},
    )

    @field_validator("before")
    @classmethod
    def _one_position(cls, value: str | None, info: ValidationInfo) -> str | None:
        check_alone(value, info, "after")
        return value

    @field_validator("types")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and not CLASS_OF_TYPE.keys() >= set(value.split(",")):
            raise ValueError("must be known types, separated by commas")
        return value

    @property
    def kinds(self) -> frozenset[type] | None:
        return (
            None if self.types is None else frozenset(CLASS_OF_TYPE[name] for name in self.types.split(","))
        )


class EventAnswer(BaseModel):
    """One event, with the members that a stream shows of it; a `turn.failed` without those of a request.

    What happens outside of turns: `state.changed` (`state`: the merge patch), `head.moved` (`cause`:
    `rewind` or `restore`, `previous`, `head`, `checkpoint_id`), `session.compacted` (`note_id`, `through`:
    the last turn that the summary stands for).
    """

    model_config = ConfigDict(extra="allow")

    id: str = Field(description="Its id, a position for `after` and `before`.", examples=[_EVENT_ID])
    type: str = Field(description="What happened.", examples=["turn.finished"])
    turn_id: str | None = Field(description="Its turn; `null` outside of turns.", examples=[TURN_ID])
    seq: int | None = Field(description="Its number in the turn; `null` outside of turns.", examples=[3])
    created_at: Time = Field(description="When it happened.", examples=[TIME])


class EventList(BaseModel):
    """A page of events, ascending."""

    events: list[EventAnswer] = Field(description="The events.")


@router.get(
    "/sessions/{session_id}/events",
    summary="Read what happened",
    response_model=EventList,
    responses=problems("SESSION_NOT_FOUND", "TURN_NOT_FOUND", "SNAPSHOT_UNREADABLE", "STORE_UNAVAILABLE"),
)
async def list_events(key: SessionKeyDep, call: CallDep, query: Annotated[EventQuery, Query()]) -> Response:
    """The session's events, ascending, those of failed and cancelled turns too, of every branch.

    Without a position the newest page. Of a turn that has ended, its text is one `text.delta`.
    """
    told = await call.services.sessions.events(
        key,
        limit=query.limit,
        after=query.after,
        before=query.before,
        since=query.since,
        kinds=query.kinds,
        user_id=query.user_id,
    )
    # Not by the model: an event may hold half a surrogate pair, which only escapes can carry.
    return Response(
        to_json({"events": [_members_of(event) for event in told]}), media_type="application/json"
    )


def _members_of(told: StoryEvent) -> Members:
    kind, members = describe(told.event)
    named = {
        "id": told.id,
        "type": kind,
        "turn_id": told.turn_id,
        "seq": told.seq,
        "created_at": to_time(told.created_at),
    }
    return named | members | named  # a member of the same name never hides them
