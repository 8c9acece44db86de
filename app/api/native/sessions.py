"""Sessions: make, list, read, change and delete them."""

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Body, Header, Query, Response

from app.api.deps import Call, CallDep, SessionKeyDep
from app.api.docs import WITH_BODY, problems
from app.api.etag import ETAG_PATTERN, parse_if_match
from app.api.native.cursor import open_cursor, seal_cursor
from app.api.native.fields import NoQuery, SessionQuery
from app.api.native.requests import (
    BatchBody,
    BatchDeleteBody,
    NewSessionBody,
    ResumeBody,
    SessionGetQuery,
    SessionListQuery,
    SessionPatch,
)
from app.api.native.responses import (
    BatchAnswer,
    BatchDeletedAnswer,
    BatchResult,
    SessionAnswer,
    SessionList,
    SessionMessage,
)
from app.api.route import StrictRoute
from app.domain.errors import AgentPoolError, Forbidden
from app.domain.session import SessionStatus
from app.services.sessions import NewSession, SessionView

router = APIRouter(route_class=StrictRoute, tags=["sessions"])

_NEW_EXAMPLES = {
    "smallest": {"summary": "For a user and a window", "value": {"user_id": "alice", "window_id": "desktop"}},
    "choices": {
        "summary": "With an id, a title and data",
        "value": {
            "session_id": "user_001",
            "user_id": "alice",
            "title": "Weather",
            "metadata": {"language": "zh-CN"},
            "params": {"temperature": 0.2},
        },
    },
    "template": {
        "summary": "With an agent of its own",
        "value": {
            "state": {"city": "北京"},
            "template": {
                "system_prompt": "You help {name}, who lives in {city}.",
                "context": {"name": "张三"},
            },
        },
    },
}
_RESUME_EXAMPLES = {
    "user": {"summary": "Where the user was last", "value": {"user_id": "alice"}},
    "window": {"summary": "In one window", "value": {"user_id": "alice", "window_id": "desktop"}},
}
_BATCH_EXAMPLES = {
    "two": {
        "summary": "For two users",
        "value": {"sessions": [{"user_id": "alice"}, {"user_id": "bob", "session_id": "user_002"}]},
    },
}
_BATCH_DELETE_EXAMPLES = {
    "two": {"summary": "Two sessions", "value": {"session_ids": ["user_001", "user_002"]}},
}
_PATCH_EXAMPLES = {
    "title": {"summary": "A title", "value": {"title": "Weather"}},
    "metadata": {
        "summary": "Set one key, take another away",
        "value": {"metadata": {"tier": "premium", "trial": None}},
    },
    "template": {"summary": "The profile's own agent again", "value": {"template": None}},
    "archive": {"summary": "Archive it", "value": {"status": "archived"}},
}
ETAG_DOC = {"ETag": {"description": "Names this state of the record.", "schema": {"type": "string"}}}
NEW_DOC = {**ETAG_DOC, "Location": {"description": "Its path.", "schema": {"type": "string"}}}
_GET_DOC = {
    200: {"headers": ETAG_DOC},
    **problems("SESSION_NOT_FOUND", "SNAPSHOT_UNREADABLE", "STORE_UNAVAILABLE"),
}


@router.post(
    "/sessions",
    summary="Create a session",
    status_code=201,
    responses={
        201: {"headers": NEW_DOC},
        **problems(
            *WITH_BODY,
            "SESSION_EXISTS",
            "SESSION_BUSY",
            "AGENT_NOT_FOUND",
            "UNKNOWN_MODEL",
            "SESSION_LIMIT",
            "STORE_UNAVAILABLE",
        ),
    },
)
async def create_session(
    call: CallDep,
    response: Response,
    _query: Annotated[NoQuery, Query()],
    body: Annotated[NewSessionBody | None, Body(openapi_examples=_NEW_EXAMPLES)] = None,
) -> SessionAnswer:
    """Create a session, with an id of the caller's choice or a generated one."""
    body = body or NewSessionBody()
    new = body.to_new_session(call.namespace_of(body.user_id), redact_keys=call.options.redact_keys)
    call.exchange.session_id = new.session_id
    view = await call.services.sessions.create(new)
    call.exchange.session_id = view.session_id
    return answer_new(view, call, response)


@router.post(
    "/sessions/resume",
    summary="Find or create a session",
    responses={
        200: {"headers": ETAG_DOC},
        201: {"description": "A new one.", "model": SessionAnswer, "headers": NEW_DOC},
        **problems(
            *WITH_BODY,
            "SESSION_BUSY",
            "AGENT_NOT_FOUND",
            "UNKNOWN_MODEL",
            "SESSION_LIMIT",
            "STORE_UNAVAILABLE",
        ),
    },
)
async def resume_session(
    call: CallDep,
    response: Response,
    _query: Annotated[NoQuery, Query()],
    body: Annotated[ResumeBody, Body(openapi_examples=_RESUME_EXAMPLES)],
) -> SessionAnswer:
    """The user's newest active session with this agent and in this window, or else a new one."""
    view, is_new = await call.services.sessions.resume(body.to_new_session(call.namespace_of(body.user_id)))
    call.exchange.session_id = view.session.key.session_id
    if not is_new:
        return answer(view, response)
    response.status_code = 201
    return answer_new(view, call, response)


@router.get("/sessions", summary="List sessions", responses=problems("STORE_UNAVAILABLE"))
async def list_sessions(call: CallDep, query: Annotated[SessionListQuery, Query()]) -> SessionList:
    """Sessions, newest activity first."""
    filters = ("sessions", query.user_id, query.agent_id, query.window_id, query.status, query.q or None)
    page = await call.services.sessions.list(
        call.namespace.listed,
        limit=query.limit,
        cursor=open_cursor(query.cursor, *filters),
        user_id=query.user_id,
        agent_id=query.agent_id,
        window_id=query.window_id,
        status=None if query.status is None else SessionStatus(query.status),
        text=query.q or None,
    )
    return SessionList.of(page, seal_cursor(page.next_cursor, *filters))


@router.head("/sessions/{session_id:session}", include_in_schema=False)
@router.get("/sessions/{session_id:session}", summary="Get a session", responses=_GET_DOC)
async def get_session(
    key: SessionKeyDep,
    response: Response,
    call: CallDep,
    query: Annotated[SessionGetQuery, Query()],
) -> SessionAnswer:
    """A session, an expired one too."""
    if query.include is None:
        return answer(await call.services.sessions.get(key, query.user_id), response)
    view, state = await call.services.sessions.merged_state(key, query.user_id)
    return answer(view, response, state)


@router.patch(
    "/sessions/{session_id:session}",
    summary="Change a session",
    responses={
        200: {"headers": ETAG_DOC},
        **problems(
            *WITH_BODY,
            "SESSION_NOT_FOUND",
            "PRECONDITION_FAILED",
            "AGENT_NOT_FOUND",
            "UNKNOWN_MODEL",
            "SNAPSHOT_UNREADABLE",
            "STORE_UNAVAILABLE",
        ),
    },
)
async def change_session(
    key: SessionKeyDep,
    response: Response,
    call: CallDep,
    query: Annotated[SessionQuery, Query()],
    body: Annotated[SessionPatch, Body(openapi_examples=_PATCH_EXAMPLES)],
    if_match: Annotated[
        str | None,
        Header(
            description="Change it only if this is its ETag.",
            examples=['"0.1"'],
            json_schema_extra={"pattern": ETAG_PATTERN},
        ),
    ] = None,
) -> SessionAnswer:
    """Change a session by a JSON merge patch; a running turn goes on as it began."""
    change = body.to_change(call.namespace, redact_keys=call.options.redact_keys)
    view = await call.services.sessions.update(
        key, change, if_match=parse_if_match(if_match), user_id=query.user_id
    )
    return answer(view, response)


@router.delete(
    "/sessions/{session_id:session}",
    summary="Delete a session",
    responses=problems("SESSION_NOT_FOUND", "STORE_UNAVAILABLE"),
)
async def delete_session(
    key: SessionKeyDep, call: CallDep, _query: Annotated[SessionQuery, Query()]
) -> SessionMessage:
    """Delete a session and all that belongs to it; its running turn is cancelled."""
    await call.services.sessions.delete(key, call.namespace.user_to_check)
    return SessionMessage(message="Session deleted", session_id=key.session_id)


@router.post(
    "/sessions/{session_id}/refresh",
    summary="Restart a session's expiry clock",
    responses=_GET_DOC,
)
async def refresh_session(
    key: SessionKeyDep,
    response: Response,
    call: CallDep,
    query: Annotated[SessionQuery, Query()],
) -> SessionAnswer:
    """Restart the expiry clock. An expired session is active again until it is purged."""
    return answer(await call.services.sessions.refresh(key, query.user_id), response)


@router.post(
    "/sessions/batch",
    summary="Create many sessions",
    responses=problems(*WITH_BODY, "STORE_UNAVAILABLE"),
)
async def create_sessions(
    call: CallDep,
    _query: Annotated[NoQuery, Query()],
    body: Annotated[BatchBody, Body(openapi_examples=_BATCH_EXAMPLES)],
) -> BatchAnswer:
    """Create up to 1,000 sessions in one commit; one that is refused or malformed fails alone."""
    entries = [_new_of(entry, call) for entry in body.sessions]
    made = iter(await call.services.sessions.create_many([e for e in entries if isinstance(e, NewSession)]))
    results = [next(made) if isinstance(entry, NewSession) else entry for entry in entries]
    return BatchAnswer(results=[BatchResult.of(result) for result in results])


@router.post(
    "/sessions/batch-delete",
    summary="Delete many sessions",
    responses=problems(*WITH_BODY, "STORE_UNAVAILABLE"),
)
async def delete_sessions(
    call: CallDep,
    _query: Annotated[SessionQuery, Query()],
    body: Annotated[BatchDeleteBody, Body(openapi_examples=_BATCH_DELETE_EXAMPLES)],
) -> BatchDeletedAnswer:
    """Delete these sessions and all that belongs to them; their running turns are cancelled."""
    keys = {call.namespace.key(session_id) for session_id in body.session_ids}
    deleted = await call.services.sessions.delete_many(keys, call.namespace.user_to_check)
    return BatchDeletedAnswer(deleted=deleted, missing=len(keys) - deleted)


def _new_of(entry: NewSessionBody | AgentPoolError, call: Call) -> NewSession | AgentPoolError:
    if isinstance(entry, AgentPoolError):
        return entry
    try:
        return entry.to_new_session(call.namespace_of(entry.user_id), redact_keys=call.options.redact_keys)
    except Forbidden as refusal:
        return refusal


def answer_new(view: SessionView, call: Call, response: Response) -> SessionAnswer:
    """Return a session that was just made, and its path in ``Location``."""
    path = quote(f"/sessions/{view.session.key.session_id}", safe="/:@~")
    response.headers["Location"] = call.root_path + path
    return answer(view, response)


def answer(view: SessionView, response: Response, state: dict[str, Any] | None = None) -> SessionAnswer:
    """Return a session, its ETag in the headers."""
    response.headers["ETag"] = f'"{view.session.etag}"'
    return SessionAnswer.of(view, state)
