"""What routes ask for: the services, the options, the caller, a session's address."""

from typing import Annotated

from fastapi import Depends, Path, Request

from app.api.auth import Principal, authenticate
from app.api.exchange import Exchange, exchange_of
from app.api.options import ApiOptions
from app.domain.ids import SESSION_ID_PATTERN, SessionKey, parse_name, parse_session_id, parse_uuid
from app.services import Services


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def _options(request: Request) -> ApiOptions:
    options: ApiOptions = request.app.state.api_options
    return options


async def _exchange(request: Request) -> Exchange:
    return exchange_of(request.scope)


ServicesDep = Annotated[Services, Depends(_services)]
OptionsDep = Annotated[ApiOptions, Depends(_options)]
ExchangeDep = Annotated[Exchange, Depends(_exchange)]
CallerDep = Annotated[Principal, Depends(authenticate)]


async def _session_key(
    session_id: Annotated[
        str,
        Path(
            description="The session's id.",
            examples=["user_001"],
            json_schema_extra={"pattern": SESSION_ID_PATTERN},
        ),
    ],
    caller: CallerDep,
    exchange: ExchangeDep,
) -> SessionKey:
    exchange.session_id = parse_session_id(session_id)
    return SessionKey(caller.owner, session_id)


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
    user_id: Annotated[str, Path(description="The user's id.", examples=["alice"])],
) -> str:
    return parse_name(user_id, "user_id")


SessionKeyDep = Annotated[SessionKey, Depends(_session_key)]
TurnIdDep = Annotated[str, Depends(_turn_id)]
UserIdDep = Annotated[str, Depends(_user_id)]
