"""Any bytes, in any pieces, on a connection: nothing is raised, and whoever said something is answered."""

import asyncio
from typing import Any

import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from app.api.protocol import PushingProtocol

REQUESTS = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n",
    b"POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\nhello",
    b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD / HTTP/1.0\r\n\r\n",
    b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\n\r\n",
)
PIECES = st.lists(
    st.sampled_from(REQUESTS)
    | st.sampled_from(REQUESTS).flatmap(lambda whole: st.integers(1, len(whole)).map(lambda n: whole[:n]))
    | st.sampled_from(
        [b"\r\n", b"\0", b":", b"X: y\r\n", b"Content-Length: 3\r\n", b"0\r\n", b"X: " + b"y" * 40_000]
    )
    | st.binary(min_size=1, max_size=8),
    min_size=1,
    max_size=6,
)


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_over = False

    def write(self, data: Any) -> None:
        assert not self.is_over
        self.written += data

    def write_eof(self) -> None:
        self.is_over = True

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.is_over = True

    def is_closing(self) -> bool:
        return self.is_over

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def read_all(scope: Any, receive: Any, send: Any) -> None:
    more = True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        more = event["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


CONFIG = uvicorn.Config(read_all, log_config=None, access_log=False)


@settings(max_examples=300)
@given(PIECES)
def test_any_bytes(pieces: list[bytes]) -> None:
    """Each complete request gets a 200, and the first that is none gets a refusal, which is the last word."""
    asyncio.run(feed(pieces))


async def feed(pieces: list[bytes]) -> None:
    state, transport = ServerState(), Transport()
    connection = PushingProtocol(CONFIG, state, {})
    connection.connection_made(transport)
    for piece in pieces:
        if not transport.is_over:
            connection.data_received(piece)
        for _ in range(5):  # so long an answer takes here
            await asyncio.sleep(0)
    if connection._rest is not None and not transport.is_over:  # its time is up
        connection._rest.cancel()
        connection._check_arrival(connection._fed)
    if state.tasks:
        assert not (await asyncio.wait(state.tasks, timeout=5))[1]
    assert transport.written
    statuses = [line.split()[1] for line in transport.written.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert all(status == b"200" for status in statuses[:-1])
    if connection._refusal is not None:
        assert statuses[-1] in (b"400", b"408", b"414", b"431")
    connection.connection_lost(None)
