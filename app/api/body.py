"""Reading a request's body: never more than the limit, and only JSON."""

import asyncio
from collections.abc import Iterable

from starlette.types import Message as Event
from starlette.types import Receive

from app.api.departure import ClientLeft
from app.api.errors import PayloadTooLarge, UnsupportedMediaType

DRAIN_BYTES = 64 * 1024
DRAIN_S = 1.0
MAX_TYPE_BYTES = 200
"""Of Content-Type: no media type with a charset needs more."""
_BODILESS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})


class BodyHeaders:
    """The request headers that say something about the body."""

    __slots__ = ("content_type", "encoding", "expects_continue", "is_chunked", "length")

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.length: int | None = None
        self.content_type: bytes | None = None
        self.encoding = b"identity"
        self.is_chunked = False
        self.expects_continue = False
        for name, value in headers:
            if name == b"content-length" and value.isdigit():
                self.length = int(value)
            elif name == b"content-type":
                # Two types contradict each other: together they are none.
                self.content_type = value if self.content_type is None else b""
            elif name == b"content-encoding":
                self.encoding = value.strip().lower()
            elif name == b"transfer-encoding":
                self.is_chunked = True
                if value.strip().lower() != b"chunked":
                    self.encoding = value
            elif name == b"expect":
                self.expects_continue = True

    def may_have_body(self, method: str) -> bool:
        """Whether a body must be looked for; HTTP/2 bodies have neither length nor chunks."""
        return bool(self.length) or self.is_chunked or method not in _BODILESS

    def check_json(self) -> None:
        """Refuse a body that is not declared as plain UTF-8 JSON.

        Raises:
            UnsupportedMediaType
        """
        if self.encoding not in (b"", b"identity") or not _is_json(self.content_type):
            raise UnsupportedMediaType()


async def read_body(receive: Receive, announced: int | None, limit: int) -> bytes:
    """Return the whole body. It is cut while it is read, whatever its announced length.

    Raises:
        PayloadTooLarge: it is, or is announced as, longer than ``limit`` bytes.
        ClientLeft: the connection ended first.
    """
    if announced is not None and announced > limit:
        raise PayloadTooLarge()
    body = bytearray()
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ClientLeft
        body += event.get("body", b"")
        if len(body) > limit:
            raise PayloadTooLarge()
        if not event.get("more_body", False):
            return bytes(body)


async def drain(receive: Receive) -> None:
    """Swallow a little of what the client still sends, so that it gets to read the refusal.

    A client that writes its whole request first would otherwise see a reset connection.
    Ends after ``DRAIN_BYTES``, after ``DRAIN_S`` or with the body.
    """
    swallowed = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while swallowed < DRAIN_BYTES:
                event = await receive()
                swallowed += len(event.get("body", b""))
                if not event.get("more_body", False):
                    return
    except TimeoutError:
        pass


def replaying(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` once, and then what ``receive`` gives."""
    pending: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Event:
        return pending.pop() if pending else await receive()

    return replay


def _is_json(content_type: bytes | None) -> bool:
    if content_type is None or content_type == b"application/json":
        return content_type is not None
    if len(content_type) > MAX_TYPE_BYTES:
        return False
    media_type, *parameters = content_type.lower().split(b";")
    named = [parameter.partition(b"=") for parameter in parameters]
    charsets = {value.strip(b' \t"') for name, _, value in named if name.strip() == b"charset"}
    return media_type.strip() == b"application/json" and charsets <= {b"utf-8", b"utf8"}
