"""State: key–value data of an application, of a user, of a session."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi import Body as BodyParam
from pydantic import BaseModel, Field

from app.api.deps import AdminDep, AppNameDep, Call, CallDep, SessionKeyDep, UserIdDep
from app.api.docs import WITH_BODY, problems
from app.api.etag import ETAG_PATTERN, parse_expected_rev
from app.api.native.fields import Body, JsonObject, Name, NoQuery, SessionQuery, State
from app.api.native.redact import redact
from app.api.route import StrictRoute
from app.domain.state import SharedState, StateScope

router = APIRouter(route_class=StrictRoute, tags=["state"])

_DOC: dict[int | str, dict[str, Any]] = {
    200: {
        "headers": {"ETag": {"description": "Names this state, `<rev>`.", "schema": {"type": "string"}}},
    }
}
_EXAMPLES = {
    "set": {"summary": "Set a key", "value": {"state": {"language": "zh-CN"}}},
    "merge": {
        "summary": "Set one inside of another, take one away",
        "value": {"state": {"cart": {"items": 3}, "draft": None}},
    },
}
_IfMatch = Annotated[
    str | None,
    Header(
        description="Change it only if this is its ETag; without, what it is then.",
        examples=['"3"'],
        json_schema_extra={"pattern": ETAG_PATTERN},
    ),
]


class StateBody(Body):
    """A change of a state."""

    state: State = Field(
        description="Merged into the state (RFC 7396): what is left out stays, `null` takes a key away. "
        "64 KiB, 32 deep, 1,000 keys, itself and what comes of it; no key that begins with `temp:`, `app:` "
        "or `user:`. Values under keys like `password` are redacted.",
        examples=[{"language": "zh-CN", "draft": None}],
    )

    def to_patch(self, call: Call) -> JsonObject:
        patch: JsonObject = redact(self.state) if call.options.redact_keys else self.state
        return patch


_PatchBody = Annotated[StateBody, BodyParam(openapi_examples=_EXAMPLES)]


class StateAnswer(BaseModel):
    """A state."""

    state: dict[str, Any] = Field(description="Its keys and values.", examples=[{"language": "zh-CN"}])


class UserStateQuery(NoQuery):
    """In which application."""

    app_name: Name | None = Field(
        default=None,
        description="The application; left out, the server's `APP_NAME`.",
        examples=["default"],
    )


@router.get(
    "/apps/{app_name}/state",
    summary="Get an application's state",
    responses={**_DOC, **problems("STORE_UNAVAILABLE")},
)
async def get_app_state(
    app_name: AppNameDep, response: Response, call: CallDep, _query: Annotated[NoQuery, Query()]
) -> StateAnswer:
    """What all sessions of the application share; empty if it was never set."""
    return _answer(await call.services.sessions.get_shared(StateScope(app_name)), response)


@router.patch(
    "/apps/{app_name}/state",
    summary="Change an application's state",
    dependencies=[AdminDep],
    responses={**_DOC, **problems(*WITH_BODY, "PRECONDITION_FAILED", "STORE_UNAVAILABLE")},
)
async def change_app_state(
    app_name: AppNameDep,
    response: Response,
    call: CallDep,
    _query: Annotated[NoQuery, Query()],
    body: _PatchBody,
    if_match: _IfMatch = None,
) -> StateAnswer:
    """Merge into what all sessions of the application share; their next turns see it."""
    return await _change_shared(StateScope(app_name), body, if_match, call, response)


@router.get(
    "/users/{user_id}/state",
    summary="Get a user's state",
    responses={**_DOC, **problems("STORE_UNAVAILABLE")},
)
async def get_user_state(
    user_id: UserIdDep, response: Response, call: CallDep, query: Annotated[UserStateQuery, Query()]
) -> StateAnswer:
    """What all sessions of the user share in one application; empty if it was never set."""
    return _answer(await call.services.sessions.get_shared(_scope_of(user_id, query, call)), response)


@router.patch(
    "/users/{user_id}/state",
    summary="Change a user's state",
    responses={**_DOC, **problems(*WITH_BODY, "PRECONDITION_FAILED", "STORE_UNAVAILABLE")},
)
async def change_user_state(
    user_id: UserIdDep,
    response: Response,
    call: CallDep,
    query: Annotated[UserStateQuery, Query()],
    body: _PatchBody,
    if_match: _IfMatch = None,
) -> StateAnswer:
    """Merge into what all sessions of the user share in one application; their next turns see it."""
    return await _change_shared(_scope_of(user_id, query, call), body, if_match, call, response)


@router.get(
    "/sessions/{session_id}/state",
    summary="Get a session's state",
    responses={**_DOC, **problems("SESSION_NOT_FOUND", "SNAPSHOT_UNREADABLE", "STORE_UNAVAILABLE")},
)
async def get_session_state(
    key: SessionKeyDep, response: Response, call: CallDep, query: Annotated[SessionQuery, Query()]
) -> StateAnswer:
    """The session's own keys, as they are on the current branch."""
    session = await call.services.sessions.get_state(key, query.user_id)
    return _answer(SharedState(session.state, session.state_rev), response)


@router.patch(
    "/sessions/{session_id}/state",
    summary="Change a session's state",
    responses={
        **_DOC,
        **problems(
            *WITH_BODY, "SESSION_NOT_FOUND", "PRECONDITION_FAILED", "SNAPSHOT_UNREADABLE", "STORE_UNAVAILABLE"
        ),
    },
)
async def change_session_state(
    key: SessionKeyDep,
    response: Response,
    call: CallDep,
    query: Annotated[SessionQuery, Query()],
    body: _PatchBody,
    if_match: _IfMatch = None,
) -> StateAnswer:
    """Merge into the session's state. It belongs to the branch: going back brings back what it was."""
    session = await call.services.sessions.patch_state(
        key, body.to_patch(call), expected_rev=parse_expected_rev(if_match), user_id=query.user_id
    )
    return _answer(SharedState(session.state, session.state_rev), response)


async def _change_shared(
    scope: StateScope, body: StateBody, if_match: str | None, call: Call, response: Response
) -> StateAnswer:
    changed = await call.services.sessions.patch_shared(
        scope, body.to_patch(call), expected_rev=parse_expected_rev(if_match)
    )
    return _answer(changed, response)


def _scope_of(user_id: str, query: UserStateQuery, call: Call) -> StateScope:
    return StateScope(query.app_name or call.options.app_name, call.namespace.owner, user_id)


def _answer(state: SharedState, response: Response) -> StateAnswer:
    response.headers["ETag"] = f'"{state.rev}"'
    return StateAnswer(state=state.values)
