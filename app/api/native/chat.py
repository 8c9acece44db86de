"""Chat: one message in, an answer or a stream of events out."""

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response

from app.api.departure import client_watched
from app.api.deps import Call, CallDep, call_of
from app.api.docs import WITH_BODY, problems
from app.api.etag import ETAG_PATTERN, parse_expected_head
from app.api.native.encoder import NativeEncoder
from app.api.native.fields import NoQuery, check_message
from app.api.native.kinds import EVENT_TYPES, to_json
from app.api.native.requests import ChatBody
from app.api.native.responses import ChatAnswer
from app.api.route import StrictRoute, find_body, shortcut
from app.api.sse import MEDIA_TYPE, EventStream, StoredEvents
from app.domain.chat import ChatReply, PastTurn
from app.domain.errors import Draining
from app.domain.events import TurnCancelled
from app.domain.idempotency import KEY_PATTERN, parse_key
from app.domain.replay import replay
from app.domain.turn import CancelReason
from app.services.turns import Flight

router = APIRouter(route_class=StrictRoute, tags=["chat"])

REFUSALS = (
    "SESSION_NOT_FOUND",
    "TURN_NOT_FOUND",
    "AGENT_NOT_FOUND",
    "SESSION_BUSY",
    "TURN_QUEUE_FULL",
    "SESSION_ARCHIVED",
    "SESSION_EXPIRED",
    "SESSION_LIMIT",
    "POOL_EXHAUSTED",
    "DRAINING",
    "UNKNOWN_MODEL",
    "IDEMPOTENCY_MISMATCH",
    "HEAD_MOVED",
    "SNAPSHOT_UNREADABLE",
    "STORE_UNAVAILABLE",
)
FAILURES = (
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
    "edited": {
        "summary": "From the beginning, on a new branch",
        "value": {"session_id": "user_001", "message": "你好，我叫李四", "parent": "root"},
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


IdempotencyKeyHeader = Annotated[
    str | None,
    Header(
        description="A repeat of the request with the same key gets the same turn.",
        examples=["5f0c1a4e"],
        json_schema_extra={"pattern": KEY_PATTERN},
    ),
]
HeadHeader = Annotated[
    str | None,
    Header(
        description="Go on only if the session's head is that of this ETag when it is this request's turn.",
        examples=['"0.1"'],
        json_schema_extra={"pattern": ETAG_PATTERN},
    ),
]


async def _begin(
    body: Annotated[ChatBody, Body(openapi_examples=_EXAMPLES)],
    call: CallDep,
    _query: Annotated[NoQuery, Query()],
    idempotency_key: IdempotencyKeyHeader = None,
    if_match: HeadHeader = None,
) -> Flight | PastTurn:
    check_message(body.message, call.options.max_message_chars)
    request = body.to_request(
        call.namespace_of(body.user_id),
        redact_keys=call.options.redact_keys,
        expected_head=parse_expected_head(if_match),
        idempotency_key=None if idempotency_key is None else parse_key(idempotency_key),
    )
    begun = await call.services.chat.begin(request)
    note_turn(begun, call)
    return begun


BegunDep = Annotated[Flight | PastTurn, Depends(_begin)]


async def _begin_shortly(request: Request) -> tuple[Flight | PastTurn, Call] | None:
    if (body := find_body(request, ChatBody)) is None:
        return None
    call = await call_of(request)
    key, if_match = request.headers.get("idempotency-key"), request.headers.get("if-match")
    return await _begin(body, call, NoQuery(), key, if_match), call


async def _chat_shortly(request: Request) -> Response | None:
    if (begun := await _begin_shortly(request)) is None:
        return None
    members = ChatAnswer.members_of(await wait_reply(*begun))
    return Response(to_json(members), media_type="application/json")


async def _stream_shortly(request: Request) -> Response | None:
    begun = await _begin_shortly(request)
    return None if begun is None else await stream_answer(*begun)


@router.post(
    "/chat",
    summary="Send a message, get the whole answer",
    responses=problems(*WITH_BODY, *REFUSALS, *FAILURES),
)
@shortcut(_chat_shortly)
async def chat(begun: BegunDep, call: CallDep) -> ChatAnswer:
    """Carry out one turn of the session, creating the session if there is none of this id.

    If the client leaves, a turn that runs goes on; one that still waits is dropped.
    """
    return ChatAnswer.of(await wait_reply(begun, call))


@router.post(
    "/chat/stream",
    summary="Send a message, watch the answer come",
    response_class=Response,
    responses={200: STREAM_DOC, **problems(*WITH_BODY, *REFUSALS)},
)
@shortcut(_stream_shortly)
async def chat_stream(begun: BegunDep, call: CallDep) -> Response:
    """As `POST /chat`, with server-sent events while the agent works.

    What goes wrong before the agent starts is an ordinary error; afterwards it is `turn.failed`.
    If the client leaves, the turn goes on and can be watched again.
    """
    return await stream_answer(begun, call)


def note_turn(begun: Flight | PastTurn, call: Call) -> None:
    """See to it that the response names the turn, whatever it will be.

    A repeat, which began none, gives its place in the gate back.
    """
    if (place := call.exchange.place) is not None and (isinstance(begun, PastTurn) or begun.is_shared):
        place.leave()
    if isinstance(begun, PastTurn):
        call.exchange.accept_turn(begun.session_id, begun.turn.turn_id)
    else:
        call.exchange.accept_turn(begun.key.session_id, begun.turn_id)
        call.exchange.quotas += begun.quotas


async def wait_reply(begun: Flight | PastTurn, call: Call) -> ChatReply:
    """Return the answer of a turn when it has ended.

    Raises:
        ClientLeft: nobody waits for it any more.
        AgentPoolError: it did not finish; ``code`` says how.
    """
    if isinstance(begun, Flight):
        try:
            async with client_watched(call.receive):
                ended = await begun.wait_ended()
        finally:
            begun.leave()
        if isinstance(ended, TurnCancelled) and ended.reason is CancelReason.DRAIN:
            raise Draining(turn_id=begun.turn_id)
    return call.services.chat.reply_of(begun)


async def stream_answer(begun: Flight | PastTurn, call: Call) -> Response:
    """Return the turn's events as they come, once it has started.

    Raises:
        ClientLeft: nobody waits for them any more.
        AgentPoolError: it was refused before it started.
    """
    encoder = NativeEncoder(call.exchange)
    if isinstance(begun, PastTurn):
        return StoredEvents(begun.turn.turn_id, replay(begun.turn, begun.session_id), encoder)
    try:
        async with client_watched(call.receive):
            await begun.wait_started()
    except BaseException:
        begun.leave()
        raise
    return EventStream(begun.log, encoder, heartbeat_s=call.options.heartbeat_s, on_end=begun.leave)
