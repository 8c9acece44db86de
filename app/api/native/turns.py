"""Turns of a session: what was said, what happened, what happens now."""

import re
from typing import Annotated

from fastapi import APIRouter, Body, Header, Query, Response

from app.api.departure import client_watched
from app.api.deps import CallDep, SessionKeyDep, TurnIdDep
from app.api.docs import WITH_BODY, problems
from app.api.errors import problem_response
from app.api.native.chat import STREAM_DOC
from app.api.native.cursor import open_cursor, seal_cursor
from app.api.native.encoder import NativeEncoder
from app.api.native.fields import SessionQuery
from app.api.native.requests import CancelBody, HistoryQuery, TurnListQuery, WatchQuery
from app.api.native.responses import ActiveAnswer, CancelAnswer, HistoryAnswer, TurnAnswer, TurnList
from app.api.route import StrictRoute
from app.api.sse import EventStream, StoredEvents
from app.domain.errors import InvalidInput, NoActiveTurn
from app.services.turn_log import TurnLog
from app.services.turns import Flight

router = APIRouter(route_class=StrictRoute, tags=["turns"])

_EVENT_ID = re.compile(r"(?P<turn_id>[0-9a-f-]{36}):(?P<seq>[0-9]{1,9})")
_CANCEL_EXAMPLES = {
    "keep": {"summary": "Stop, and keep what was said", "value": {"keep_partial": True}},
    "drop": {"summary": "As if it had never been asked", "value": {"keep_partial": False}},
    "all": {"summary": "The waiting ones, too", "value": {"all": True}},
}


@router.get(
    "/sessions/{session_id}/history",
    summary="Read the conversation",
    responses=problems("SESSION_NOT_FOUND", "TURN_NOT_FOUND", "SNAPSHOT_UNREADABLE", "STORE_UNAVAILABLE"),
)
async def get_history(
    key: SessionKeyDep, call: CallDep, query: Annotated[HistoryQuery, Query()]
) -> HistoryAnswer:
    """The newest page of the current branch, ascending, in whole turns."""
    history = await call.services.sessions.history(
        key, limit=query.limit, before=query.before, user_id=query.user_id
    )
    return HistoryAnswer.of(history)


@router.get(
    "/sessions/{session_id}/turns",
    summary="List the turns",
    responses=problems("SESSION_NOT_FOUND", "STORE_UNAVAILABLE"),
)
async def list_turns(key: SessionKeyDep, call: CallDep, query: Annotated[TurnListQuery, Query()]) -> TurnList:
    """All turns, newest first: failed, cancelled and running ones, and those of other branches, too."""
    cursor = open_cursor(query.cursor, "turns", key.session_id)
    page = await call.services.sessions.turns(key, limit=query.limit, cursor=cursor, user_id=query.user_id)
    return TurnList.of(page, seal_cursor(page.next_cursor, "turns", key.session_id))


@router.get(
    "/sessions/{session_id}/turns/active",
    summary="Get the running turn",
    response_model=ActiveAnswer,
    responses=problems("SESSION_NOT_FOUND", "STORE_UNAVAILABLE"),
)
async def get_active_turn(
    key: SessionKeyDep,
    call: CallDep,
    query: Annotated[SessionQuery, Query()],
) -> Response | ActiveAnswer:
    """The running turn and those that wait; 404 `NO_ACTIVE_TURN` when there is neither."""
    try:
        return ActiveAnswer.of(await call.services.chat.active(key, query.user_id))
    except NoActiveTurn as error:
        return problem_response(error, call.exchange, status=404)  # here it is what was asked for


@router.get(
    "/sessions/{session_id}/turns/{turn_id}",
    summary="Get a turn",
    responses=problems("SESSION_NOT_FOUND", "TURN_NOT_FOUND", "SNAPSHOT_UNREADABLE", "STORE_UNAVAILABLE"),
)
async def get_turn(
    key: SessionKeyDep, turn_id: TurnIdDep, call: CallDep, query: Annotated[SessionQuery, Query()]
) -> TurnAnswer:
    """One turn, however it went."""
    return TurnAnswer.of(await call.services.sessions.turn(key, turn_id, query.user_id))


@router.get(
    "/sessions/{session_id}/turns/{turn_id}/stream",
    summary="Watch a turn",
    response_class=Response,
    responses={
        200: STREAM_DOC,
        204: {"description": "Nothing is left to send."},
        **problems("SESSION_NOT_FOUND", "TURN_NOT_FOUND", "SNAPSHOT_UNREADABLE", "STORE_UNAVAILABLE"),
    },
)
async def watch_turn(
    key: SessionKeyDep,
    turn_id: TurnIdDep,
    call: CallDep,
    query: Annotated[WatchQuery, Query()],
    last_event_id: Annotated[
        str | None,
        Header(
            description="The id of the last event that was seen: `<turn_id>:<seq>`.",
            json_schema_extra={"pattern": r"^[0-9a-f-]{36}:[0-9]{1,9}$"},
        ),
    ] = None,
) -> Response:
    """The turn's events behind a position: live while it runs and for a while after, later as stored."""
    position = query.after or 0 if last_event_id is None else parse_event_id(last_event_id, turn_id)
    async with client_watched(call.receive):
        source = await call.services.chat.watch(key, turn_id, query.user_id, after=position)
    call.exchange.accept_turn(key.session_id, turn_id)
    encoder = NativeEncoder(call.exchange)
    if isinstance(source, Flight | TurnLog):
        log, on_end = (source.log, source.leave) if isinstance(source, Flight) else (source, None)
        if log.is_closed and position >= len(log.events):
            if on_end is not None:
                on_end()
            return Response(status_code=204)
        heartbeat_s = call.options.heartbeat_s
        return EventStream(log, encoder, position=position, heartbeat_s=heartbeat_s, on_end=on_end)
    return StoredEvents(turn_id, source, encoder) if source else Response(status_code=204)


@router.post(
    "/sessions/{session_id}/cancel",
    summary="Cancel a turn",
    status_code=202,
    responses=problems(
        *WITH_BODY, "SESSION_NOT_FOUND", "TURN_NOT_FOUND", "NO_ACTIVE_TURN", "STORE_UNAVAILABLE"
    ),
)
async def cancel_turn(
    key: SessionKeyDep,
    call: CallDep,
    query: Annotated[SessionQuery, Query()],
    body: Annotated[CancelBody | None, Body(openapi_examples=_CANCEL_EXAMPLES)] = None,
) -> CancelAnswer:
    """Ask the running turn to end. Its stream ends with `turn.cancelled`, unless it finished first."""
    asked = body or CancelBody()
    turn_id = await call.services.chat.cancel(
        key,
        turn_id=asked.turn_id,
        keep_partial=asked.keep_partial is not False,
        all_turns=bool(asked.all),
        user_id=query.user_id,
    )
    return CancelAnswer(turn_id=turn_id)


def parse_event_id(text: str, turn_id: str) -> int:
    """Return the sequence number in the event id ``<turn_id>:<seq>``.

    Raises:
        InvalidInput: it is malformed, or of another turn.
    """
    parsed = _EVENT_ID.fullmatch(text)
    if parsed is None:
        raise InvalidInput("Last-Event-ID", "must be <turn_id>:<seq>")
    if parsed["turn_id"] != turn_id:
        raise InvalidInput("Last-Event-ID", "is of another turn")
    return int(parsed["seq"])
