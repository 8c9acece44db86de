"""Who makes a request: decided before anything else of it is looked at."""

from collections.abc import Mapping
from typing import Any

from app.api.docs import OPEN_PATHS, STATIC_PATH
from app.api.exchange import HOPS_KEY
from app.domain.principal import NOBODY, NODE, Principal
from app.ports.identity import Authenticator

_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
_CHALLENGE = 'Bearer realm="agentpool"'


def identify(authenticator: Authenticator, scope: Mapping[str, Any]) -> Principal:
    """Return who makes the request.

    One that another node forwards has the client's credential with it, which counts here as it
    would there. What nodes ask of their own accord needs none.

    Raises:
        Unauthenticated: it needs a credential, and has none that counts.
    """
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    if path in OPEN_PATHS or path.startswith(f"{STATIC_PATH}/"):
        return NOBODY
    if scope.get(HOPS_KEY) == 0 and (path == "/agent-stats" or path.startswith("/node/")):
        return NODE
    return authenticator.authenticate(scope["headers"])


def challenge(scope: Mapping[str, Any]) -> dict[str, str]:
    """Return the header that says what credential is wanted (RFC 6750); it does not say what was wrong."""
    is_given = any(name in _CREDENTIALS for name, _ in scope["headers"])
    return {"WWW-Authenticate": _CHALLENGE + (', error="invalid_token"' if is_given else "")}
