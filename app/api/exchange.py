"""One request and its response: what the guard learns and everything behind it may need."""

import secrets
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from app.domain.principal import ANYONE, Principal
from app.domain.quota import Quota
from app.services.overload import Place

SCOPE_KEY = "agentpool.exchange"
HOPS_KEY = "agentpool.hops"
"""In the scope of a request that another node forwarded: how often it has been."""


class Missing:
    """The type of ``MISSING``: the guard has parsed no body."""


MISSING: Final = Missing()


@dataclass(frozen=True, slots=True)
class Deed:
    """What belongs in the audit log: an admin's change, or a user's erasure, and whose data it was about.

    ``owners`` are the users who were named so far, two of them at most.
    """

    action: str
    owners: frozenset[str] = frozenset()
    receipt_id: str | None = None
    sessions: tuple[tuple[str, str | None], ...] = ()
    choices: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(slots=True)
class Exchange:
    """``path`` is the request's own, percent-encoded, with every prefix that the client used.

    ``session_id`` goes into problem documents. Once ``turn_id`` is set, a turn was
    accepted, and both ids go into the headers of whatever the answer will be.
    ``body`` is the parsed JSON. ``is_answered``: the response has begun. ``caller`` is who asks.
    ``headers`` are further ones for whatever the answer will be. ``code`` is that of the error that
    is answered. ``deed``: the audit log is to be told how it ended. ``quotas`` are the caller's limits
    that the request fell under. ``place`` is what it takes of the gate, if it is a turn.
    """

    path: str = "/"
    request_id: str = field(default_factory=lambda: secrets.token_hex(16))
    session_id: str | None = None
    turn_id: str | None = None
    body: Any = MISSING
    is_answered: bool = False
    caller: Principal = ANYONE
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    code: str | None = None
    deed: Deed | None = None
    quotas: list[Quota] = field(default_factory=list)
    place: Place | None = None

    def accept_turn(self, session_id: str, turn_id: str) -> None:
        """Note that the request began, or watches, this turn."""
        self.session_id, self.turn_id = session_id, turn_id

    def response_headers(self) -> list[tuple[bytes, bytes]]:
        """Return what every response to this request carries."""
        headers = [(b"x-request-id", self.request_id.encode()), *self.headers]
        if self.turn_id is not None and self.session_id is not None:
            headers.append((b"x-session-id", self.session_id.encode()))
            headers.append((b"x-turn-id", self.turn_id.encode()))
        return headers


def exchange_of(scope: MutableMapping[str, Any]) -> Exchange:
    """Return the request's exchange; without the guard in front a bare one is made."""
    exchange = scope.get(SCOPE_KEY)
    if not isinstance(exchange, Exchange):
        exchange = scope[SCOPE_KEY] = Exchange(path=scope.get("path", "/"))
    return exchange
