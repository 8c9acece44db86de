"""The route class of every face: the body as the guard parsed it, and no ambiguous query.

A route that is called for every turn may have a shortcut: a request that FastAPI could
find no fault with does not need to be taken apart by it, which costs more than all else
here. FastAPI has the others, and so the words for what is wrong with them.
"""

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from app.api.errors import InvalidFields
from app.api.exchange import Missing, exchange_of
from app.api.field_path import field_path
from app.api.strict_json import parse_json
from app.domain.errors import InvalidInput

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
Model = TypeVar("Model", bound=BaseModel)
Shortcut = Callable[[Request], Coroutine[Any, Any, Response | None]]

MAX_PARAMETERS = 100
"""In a query: some ten times what any route has. To say of each of 5,400 that it is not known took 0.3 s."""

_SHORTCUTS: dict[Callable[..., Any], Shortcut] = {}


def shortcut(take: Shortcut) -> Callable[[Endpoint], Endpoint]:
    """Have ``take`` answer a request without a query as the decorated endpoint would.

    It returns ``None``, and has done nothing yet, where FastAPI is to go through it.
    """

    def note(endpoint: Endpoint) -> Endpoint:
        _SHORTCUTS[endpoint] = take
        return endpoint

    return note


def find_body(request: Request, model: type[Model]) -> Model | None:
    """Return the body as FastAPI would, ``None`` where it would find fault with it."""
    try:
        return model.model_validate(exchange_of(request.scope).body)
    except ValidationError:
        return None


class ParsedRequest(Request):
    """A request whose JSON body was parsed before."""

    async def json(self) -> Any:
        body = exchange_of(self.scope).body
        return parse_json(await self.body()) if isinstance(body, Missing) else body


class StrictRoute(APIRoute):
    """Hands over parsed bodies; refuses a query that is not UTF-8 or repeats a parameter."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            if request.scope["query_string"]:
                check_query(request.scope)
            return await handle(ParsedRequest(request.scope, request.receive))

        return handle_strictly

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        take = _SHORTCUTS.get(self.endpoint)
        if take is not None and not scope["query_string"] and scope["method"] in (self.methods or ()):
            response = await take(Request(scope, receive))
            if response is not None:
                await response(scope, receive, send)
                return
        await super().handle(scope, receive, send)


def check_query(scope: Scope) -> None:
    """Refuse a query string of which two readers could make two things.

    Raises:
        InvalidInput: it is not UTF-8, or has more than ``MAX_PARAMETERS``.
        InvalidFields: a parameter is given more than once.
    """
    raw: bytes = scope["query_string"]
    try:
        text = raw.decode("ascii")
        unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput("query", "must be percent-encoded UTF-8") from None
    try:
        given = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise InvalidInput("query", f"must have at most {MAX_PARAMETERS} parameters") from None
    counted = Counter(name for name, _ in given)
    if repeated := [name for name, times in counted.items() if times > 1]:
        raise InvalidFields([(field_path([name]), "must be given once") for name in repeated])
