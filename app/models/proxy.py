"""The HTTP proxy that the environment puts between us and a provider."""

import asyncio
import socket
import urllib.request
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from app.models.address import Address, basic_of, host_of

_MAX_REPLY_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """An HTTP proxy."""

    host: str
    port: int
    credentials: str = ""  # the value of a Proxy-Authorization header

    @property
    def endpoint(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def header(self) -> str:
        return f"Proxy-Authorization: {self.credentials}\r\n" if self.credentials else ""

    async def dig(self, sock: socket.socket, address: Address) -> None:
        """Make ``sock``, which leads to the proxy, a tunnel to ``address``.

        Raises:
            OSError: the proxy refuses.
        """
        loop = asyncio.get_running_loop()
        host = f"[{address.host}]" if ":" in address.host else address.host
        target = f"{host}:{address.port}"
        request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{self.header}\r\n"
        await loop.sock_sendall(sock, request.encode())
        reply = b""
        # What follows the reply would be lost, but nobody speaks in the tunnel before we do.
        while b"\r\n\r\n" not in reply:
            part = await loop.sock_recv(sock, 4096)
            reply += part
            if not part or len(reply) > _MAX_REPLY_BYTES:
                raise ConnectionRefusedError
        if reply.split(b" ", 2)[1:2] != [b"200"]:
            raise ConnectionRefusedError


def find_proxy(address: Address) -> Proxy | None:
    """Return the proxy that the environment (``HTTPS_PROXY``, ``NO_PROXY`` …) names for ``address``."""
    url = urllib.request.getproxies().get("https" if address.is_secure else "http")
    if not url or urllib.request.proxy_bypass(address.host):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http":
        return None  # what we cannot speak is as good as not there, as in most clients
    return Proxy(host=host_of(parts), port=parts.port or 80, credentials=basic_of(parts))
