"""Chat: one message in, an answer or a stream of events out."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Header, Query, Response

from app.api.departure import ClientLeft, client_watched
from app.api.deps import CallDep
from app.api.docs import WITH_BODY, problems
from app.api.etag import parse_expected_head
from app.api.native.encoder import EVENT_TYPES, NativeEncoder
from app.api.native.fields import NoQuery, check_message
from app.api.native.requests import ChatBody
from app.api.native.responses import ChatAnswer
from app.api.route import StrictRoute
from app.api.sse import MEDIA_TYPE, EventStream
from app.domain.errors import Draining, InvalidInput
from app.domain.events import TurnCancelled
from app.domain.turn import CancelReason
from app.services.turns import Flight

router = APIRouter(route_class=StrictRoute, tags=["chat"])

CLIENT_CLOSED_REQUEST = 499  # nobody reads it but the access log; nginx's number for it
_REFUSALS = (
    "SESSION_NOT_FOUND",
    "AGENT_NOT_FOUND",
    "SESSION_BUSY",
    "TURN_QUEUE_FULL",
    "SESSION_ARCHIVED",
    "SESSION_EXPIRED",
    "SESSION_LIMIT",
    "POOL_EXHAUSTED",
    "DRAINING",
    "UNKNOWN_MODEL",
    "HEAD_MOVED",
    "SNAPSHOT_UNREADABLE",
    "STORE_UNAVAILABLE",
)
_FAILURES = (
    "MODEL_UNAVAILABLE",
    "MODEL_RATE_LIMITED",
    "MODEL_ERROR",
    "TURN_TIMEOUT",
    "TURN_CANCELLED",
)
_EXAMPLES = {
    "smallest": {"summary": "A new session", "value": {"message": "你好，我叫张三"}},
    "session": {
        "summary": "A session of one's own naming",
        "value": {"session_id": "user_001", "message": "我叫什么名字？"},
    },
    "choices": {
        "summary": "With a user, a model and parameters",
        "value": {
            "session_id": "user_001",
            "message": "你好",
            "user_id": "alice",
            "window_id": "desktop",
            "provider": "openai",
            "model": "gpt-5-mini",
            "params": {"temperature": 0.2},
        },
    },
}
_STREAM_EXAMPLE = (
    'id: 0199…:1\nevent: turn.started\ndata: {"type":"turn.started","seq":1,"turn_id":"0199…",'
    '"session_id":"user_001","activation":"new"}\n\n'
    'id: 0199…:2\nevent: text.delta\ndata: {"type":"text.delta","seq":2,"turn_id":"0199…","text":"你好"}\n\n'
)
STREAM_DOC = {
    "description": "Server-sent events. The last is `turn.finished`, `turn.failed` or `turn.cancelled`.",
    "content": {
        MEDIA_TYPE: {
            "schema": {  # of one event: tools read it so for this media type
                "type": "object",
                "properties": {
                    "id": {"type": "string", "description": "`<turn_id>:<seq>`"},
                    "event": {"type": "string", "enum": list(EVENT_TYPES)},
                    "data": {"type": "string", "contentMediaType": "application/json"},
                    "retry": {"type": "integer"},
                },
            },
            "example": _STREAM_EXAMPLE,
        }
    },
}


async def _begin(
    body: Annotated[ChatBody, Body(openapi_examples=_EXAMPLES)],
    call: CallDep,
    _query: Annotated[NoQuery, Query()],
    idempotency_key: Annotated[str | None, Header(include_in_schema=False)] = None,
    if_match: Annotated[
        str | None,
        Header(
            description="Answer only if the session's head is that of this ETag when the turn starts.",
            examples=['"0.1"'],
        ),
    ] = None,
) -> Flight:
    if idempotency_key is not None:
        raise InvalidInput("Idempotency-Key", "is not supported yet")
    check_message(body.message, call.options.max_message_chars)
    request = body.to_request(
        call.caller.owner,
        redact_keys=call.options.redact_keys,
        expected_head=parse_expected_head(if_match),
    )
    flight = await call.services.chat.begin(request)
    call.exchange.accept_turn(flight.key.session_id, flight.turn_id)
    return flight


FlightDep = Annotated[Flight, Depends(_begin)]


@router.post(
    "/chat",
    summary="Send a message, get the whole answer",
    response_model=ChatAnswer,
    responses=problems(*WITH_BODY, *_REFUSALS, *_FAILURES),
)
async def chat(flight: FlightDep, call: CallDep) -> Response | ChatAnswer:
    """Carry out one turn of the session, creating the session if there is none of this id.

    If the client leaves, a turn that runs goes on; one that still waits is dropped.
    """
    try:
        async with client_watched(call.receive):
            ended = await flight.wait_ended()
    except ClientLeft:
        call.services.chat.leave(flight)
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if isinstance(ended, TurnCancelled) and ended.reason is CancelReason.DRAIN:
        raise Draining()
    return ChatAnswer.of(call.services.chat.reply_of(flight))


@router.post(
    "/chat/stream",
    summary="Send a message, watch the answer come",
    response_class=Response,
    responses={200: STREAM_DOC, **problems(*WITH_BODY, *_REFUSALS)},
)
async def chat_stream(flight: FlightDep, call: CallDep) -> Response:
    """As `POST /chat`, with server-sent events while the agent works.

    What goes wrong before the agent starts is an ordinary error; afterwards it is `turn.failed`.
    If the client leaves, the turn goes on and can be watched again.
    """
    leave = partial(call.services.chat.leave, flight)
    try:
        async with client_watched(call.receive):
            await flight.wait_started()
    except ClientLeft:
        leave()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return EventStream(
        flight.log, NativeEncoder(call.exchange), heartbeat_s=call.options.heartbeat_s, on_leave=leave
    )
