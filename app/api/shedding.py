"""Refusing requests while the process is overloaded, before anything is done for them."""

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import problem_response
from app.api.exchange import exchange_of
from app.domain.errors import Overloaded
from app.services.overload import Burden, Gate

_TURNS: Final = ("/chat", "/chat/stream", "/regenerate", "/compact")
_ALWAYS: Final = frozenset({"/health", "/ready", "/metrics"})
_ALWAYS_BELOW: Final = ("/agent-", "/node/")


class Shedding:
    """Pure ASGI middleware, inside of what names requests: asks ``gate`` before it lets one in."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        burden = burden_of(scope)
        try:
            self._gate.enter(burden)
        except Overloaded as error:
            await problem_response(error, exchange_of(scope))(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if burden is Burden.TURN:
                self._gate.leave()


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
