"""The route class of every face: the body as the guard parsed it, and no ambiguous query."""

from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Scope

from app.api.errors import InvalidFields
from app.api.exchange import Missing, exchange_of
from app.api.field_path import field_path
from app.api.strict_json import parse_json
from app.domain.errors import InvalidInput


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


def check_query(scope: Scope) -> None:
    """Refuse a query string of which two readers could make two things.

    Raises:
        InvalidInput: it is not UTF-8.
        InvalidFields: a parameter is given more than once.
    """
    raw: bytes = scope["query_string"]
    try:
        text = raw.decode("ascii")
        unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput("query", "must be percent-encoded UTF-8") from None
    names = [name for name, _ in parse_qsl(text, keep_blank_values=True)]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise InvalidFields([(field_path([name]), "must be given once") for name in repeated])
