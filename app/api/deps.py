"""What routes ask for: the call itself, and the names in its path.

One dependency brings everything that a call works with: each further one would cost
FastAPI some 20 µs per request.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Path, Request
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.types import Receive

from app.api.audit import note_deed
from app.api.exchange import Exchange, exchange_of
from app.api.options import ApiOptions
from app.api.owner import Namespace, namespace_of
from app.domain.errors import Forbidden
from app.domain.ids import (
    NAME_MAX_CHARS,
    NAME_PATTERN,
    RESERVED_SESSION_IDS,
    SESSION_ID_PATTERN,
    SessionKey,
    parse_name,
    parse_session_id,
    parse_uuid,
)
from app.services import Services

NAME_SCHEMA = {"minLength": 1, "maxLength": NAME_MAX_CHARS, "pattern": NAME_PATTERN}


def _leave(name: str, *words: str) -> None:
    """Let ``{…:name}`` in a path match anything but ``words``, which are paths of their own.

    Those then say themselves which methods they have.
    """
    pattern = rf"(?!(?:{'|'.join(sorted(words))})(?:/|$))[^/]+"
    register_url_convertor(name, type(name, (StringConvertor,), {"regex": pattern})())


_leave("session", *RESERVED_SESSION_IDS)
_leave("checkpoint", "latest")


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way to the services, and in whose name it is made.

    ``namespace`` is that of the user whom its path or its query names, or of nobody named.
    """

    services: Services
    options: ApiOptions
    exchange: Exchange
    namespace: Namespace
    request: Request

    @property
    def root_path(self) -> str:
        """What its own links begin with."""
        root: str = self.request.scope.get("root_path", "")
        return root

    @property
    def receive(self) -> Receive:
        """Tells when the client leaves."""
        return self.request.receive

    @property
    def is_admin(self) -> bool:
        return self.exchange.caller.is_admin

    def namespace_of(self, user_id: str | None) -> Namespace:
        """Return the namespace of the user whom the request's body names, or of nobody named.

        Raises:
            Forbidden: it may not be used.
        """
        return _enter(self.request, self.exchange, user_id)


async def call_of(request: Request) -> Call:
    """Return the call that ``request`` makes.

    Raises:
        Forbidden: it names another user, and is no admin's.
    """
    state, exchange = request.app.state, exchange_of(request.scope)
    named = request.path_params.get("user_id")
    if named is None and request.scope["query_string"]:
        named = request.query_params.get("user_id")
    return Call(
        services=state.services,
        options=state.api_options,
        exchange=exchange,
        namespace=_enter(request, exchange, named),
        request=request,
    )


def _enter(request: Request, exchange: Exchange, user_id: str | None) -> Namespace:
    namespace = namespace_of(exchange.caller, user_id)
    if namespace.owner != exchange.caller.owner:
        note_deed(request, namespace.owner)
    return namespace


CallDep = Annotated[Call, Depends(call_of)]


async def _require_admin(request: Request, call: CallDep) -> None:
    if not call.is_admin:
        raise Forbidden
    note_deed(request)


AdminDep = Depends(_require_admin)
"""For routes that are the admin's alone."""


async def _session_key(
    session_id: Annotated[
        str,
        Path(
            description="The session's id.",
            examples=["user_001"],
            json_schema_extra={"pattern": SESSION_ID_PATTERN},
        ),
    ],
    call: CallDep,
) -> SessionKey:
    call.exchange.session_id = parse_session_id(session_id)
    return call.namespace.key(session_id)


async def _turn_id(
    turn_id: Annotated[
        str,
        Path(
            description="The turn's id.",
            examples=["0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"],
            json_schema_extra={"format": "uuid"},
        ),
    ],
) -> str:
    return parse_uuid(turn_id, "turn_id")


async def _user_id(
    user_id: Annotated[
        str, Path(description="The user's id.", examples=["alice"], json_schema_extra=NAME_SCHEMA)
    ],
) -> str:
    return parse_name(user_id, "user_id")


async def _checkpoint_id(
    checkpoint_id: Annotated[
        str,
        Path(
            description="The checkpoint's id.",
            examples=["0199c1f2-9a44-7c01-b2de-6f7a8b9c0d1e"],
            json_schema_extra={"format": "uuid"},
        ),
    ],
) -> str:
    return parse_uuid(checkpoint_id, "checkpoint_id")


async def _app_name(
    app_name: Annotated[
        str, Path(description="The application's name.", examples=["default"], json_schema_extra=NAME_SCHEMA)
    ],
) -> str:
    return parse_name(app_name, "app_name")


SessionKeyDep = Annotated[SessionKey, Depends(_session_key)]
TurnIdDep = Annotated[str, Depends(_turn_id)]
UserIdDep = Annotated[str, Depends(_user_id)]
CheckpointIdDep = Annotated[str, Depends(_checkpoint_id)]
AppNameDep = Annotated[str, Depends(_app_name)]
