"""What the HTTP face is told by the settings; plain values."""

from dataclasses import dataclass
from typing import Literal

AuthMode = Literal["none", "api_key", "jwt"]


@dataclass(frozen=True, slots=True)
class ApiOptions:
    """Limits and surroundings of the HTTP face.

    ``alias_prefixes`` are further mounts of the same routes, hidden from the schema.
    ``app_name`` is the application that is meant where none is named.
    ``max_message_chars`` counts characters, ``max_body_bytes`` bytes as received. ``allowed_hosts``
    are for ``app.api.hosts``; without any, all are. ``auth_mode`` is for what is told of it; who may come in
    is for the authenticator to say.
    """

    alias_prefixes: tuple[str, ...] = ("/api", "/agent_backend")
    max_body_bytes: int = 1 << 20
    max_message_chars: int = 100_000
    redact_keys: bool = True
    app_name: str = "default"
    heartbeat_s: float = 15.0
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    version: str = "0.0.0"
    auth_mode: AuthMode = "none"
