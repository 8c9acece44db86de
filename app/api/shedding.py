"""Refusing requests while the process is overloaded, before much is done for them."""

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import problem_response
from app.api.exchange import exchange_of
from app.domain.errors import Overloaded
from app.services.overload import Burden, Gate, Place

_TURNS: Final = ("/chat", "/chat/stream", "/regenerate", "/compact")
_ALWAYS: Final = frozenset({"/health", "/ready", "/metrics"})
_ALWAYS_BELOW: Final = ("/agent-", "/node/")


class Shedding:
    """Pure ASGI middleware, inside of what names requests: asks ``gate`` before it lets one go on.

    It counts none: whoever sends no body, or has no credential, would take the places of others.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._gate.check(burden_of(scope))
        except Overloaded as error:
            await problem_response(error, exchange_of(scope))(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class Places:
    """Pure ASGI middleware, where caller and body are known: turns take a place of ``gate`` each.

    Until they are answered, or ``Exchange.place`` is left before: by a repeat, which only watches.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if burden_of(scope) is not Burden.TURN:
            await self._app(scope, receive, send)
            return
        exchange = exchange_of(scope)
        try:
            place = exchange.place = Place(self._gate)
        except Overloaded as error:
            await problem_response(error, exchange)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            place.leave()


def is_refused_at_once(scope: Scope, gate: Gate) -> bool:
    """Whether ``Shedding`` would refuse the turn of ``scope`` now, which it does without waiting."""
    return gate.is_closed_to(Burden.TURN) and burden_of(scope) is Burden.TURN


def burden_of(scope: Scope) -> Burden:
    """Return what a request may cost, by its method and route alone.

    What looks after the process, and what ends a turn, must get through.
    """
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if scope["method"] == "POST":
        if path.endswith(_TURNS):
            return Burden.TURN
        if path.endswith("/cancel"):
            return Burden.NONE
    if path in _ALWAYS or path.startswith(_ALWAYS_BELOW):
        return Burden.NONE
    return Burden.OTHER
