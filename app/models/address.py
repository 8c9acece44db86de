"""Where a provider is: what a request needs, out of a URL."""

import base64
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import SplitResult, quote, unquote, urlsplit

_SAFE: Final = "/?%:@!$&'()*+,;=~"  # what stands in a path or a query as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Host, port and the path that is asked for, fit for a request as they are."""

    is_secure: bool
    host: str
    port: int
    path: str
    credentials: str = ""  # the value of an Authorization header, from the URL

    @classmethod
    def of(cls, url: str) -> Self:
        """Return the address that ``url`` (http or https) means.

        Raises:
            ValueError: it has no host, or a port that is none.
        """
        parts = urlsplit(url)
        is_secure = parts.scheme == "https"
        query = f"?{parts.query}" if parts.query else ""
        return cls(
            is_secure=is_secure,
            host=host_of(parts),
            port=parts.port or (443 if is_secure else 80),
            path=quote((parts.path or "/") + query, safe=_SAFE),
            credentials=basic_of(parts),
        )

    @property
    def endpoint(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def authority(self) -> str:
        """Host and port as the ``Host`` header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"


def host_of(parts: SplitResult) -> str:
    """Return the host that a URL names, in ASCII.

    Raises:
        ValueError: it names none.
    """
    if not parts.hostname:
        raise ValueError("a URL without a host")
    return parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()


def basic_of(parts: SplitResult) -> str:
    """Return the credentials in a URL as a header's value, ``""`` when it has none."""
    if parts.username is None:
        return ""
    named = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(named.encode()).decode()}"
