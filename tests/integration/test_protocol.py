"""A connection whose client does not read: how much it holds, and when it is cut."""

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from app.api.protocol import (
    SEND_BUFFER_BYTES,
    WRITE_BUFFER_BYTES,
    BoundedProtocol,
    PushingProtocol,
    limit_send_buffer,
)
from app.api.push import PUSH_KEY

PIECE = b"x" * 16 * 1024


class Impatient(BoundedProtocol):
    STALLED_S = 0.1


class Patient(BoundedProtocol):
    STALLED_S = 0.5  # a client that reads must have the time to, on a busy machine too


class Source:
    """An application that sends ``pieces`` and tells how far it came and how it ended."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.sent = 0
        self.left = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(self.pieces):
                await send({"type": "http.response.body", "body": PIECE, "more_body": True})
                self.sent += 1
            await send({"type": "http.response.body", "body": b""})
        finally:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()


@asynccontextmanager
async def serving(app: Any, protocol: type[asyncio.Protocol]) -> AsyncIterator[tuple[int, uvicorn.Server]]:
    config = uvicorn.Config(app, http=protocol, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    config.load()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    limit_send_buffer(listener)
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listener])
    try:
        yield listener.getsockname()[1], server
    finally:
        server.servers[0].close()
        await server.shutdown(sockets=[listener])


def connect(port: int) -> socket.socket:
    """Return a connection that has asked and takes little."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    client.setblocking(False)
    return client


async def until(done: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if done():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never happened")


async def test_a_client_that_does_not_read_is_cut() -> None:
    """After the limit its connection is reset; until then a few writes of it were held."""
    app = Source(1000)
    async with asyncio.timeout(10), serving(app, Impatient) as (port, server):
        with connect(port) as client:
            await until(lambda: any(c._stall for c in server.server_state.connections))  # type: ignore[union-attr]
            assert app.sent * len(PIECE) < 3 * SEND_BUFFER_BYTES + 3 * WRITE_BUFFER_BYTES
            await app.left.wait()
            assert not server.server_state.connections
            with pytest.raises(ConnectionResetError):
                while client.recv(1 << 20):
                    pass


async def test_a_client_that_reads_in_time_is_not_cut() -> None:
    """A client that reads, however late each time, gets everything, and no timer is left."""
    app = Source(50)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10), serving(app, Impatient) as (port, server):
        with connect(port) as client:
            got = 0
            while got < 50 * len(PIECE):
                got += len(await loop.sock_recv(client, 4096))
            (connection,) = server.server_state.connections
            assert isinstance(connection, Impatient)
            assert connection._stall is None


async def test_a_slow_client_is_not_cut_while_it_takes_enough() -> None:
    """One large answer may take longer than the limit, as long as it gets shorter."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"%d" % (1 << 20))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * (1 << 20)})

    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20), serving(app, Impatient) as (port, _):
        with connect(port) as client:
            begun, got, due = loop.time(), 0, loop.time()
            while got < 1 << 20:
                chunk = await loop.sock_recv(client, 16 * 1024)
                assert chunk
                got += len(chunk)
                due += Impatient.STALLED_S / 16
                await until(lambda due=due: loop.time() > due)  # type: ignore[misc]
            assert loop.time() - begun > 3 * Impatient.STALLED_S


async def test_a_client_that_stops_reading_later_is_cut_then() -> None:
    """To have taken enough once buys no more than one limit."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"%d" % (4 << 20))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * (4 << 20)})

    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10), serving(app, Patient) as (port, server):
        with connect(port) as client:
            begun, got = loop.time(), 0
            while loop.time() < begun + 1.5 * Patient.STALLED_S:
                got += len(await loop.sock_recv(client, 16 * 1024))
                await until(lambda due=loop.time() + 0.01: loop.time() > due)  # type: ignore[misc]
            assert server.server_state.connections
            await until(lambda: not server.server_state.connections)
            assert got < 2 << 20


async def test_the_kernel_holds_little() -> None:
    """The kernel's send buffer is inherited from the listener and at most 256 KB; ours is 16 KiB."""
    app = Source(0)
    async with asyncio.timeout(10), serving(app, BoundedProtocol) as (port, server):
        with connect(port):
            await until(lambda: bool(server.server_state.connections))
            (connection,) = server.server_state.connections
            accepted = connection.transport.get_extra_info("socket")
            assert connection.transport.get_write_buffer_limits()[1] == WRITE_BUFFER_BYTES == 16 * 1024
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 256_000
    assert BoundedProtocol.STALLED_S == 30


async def test_a_client_that_leaves_takes_its_timer_along() -> None:
    """A stalled client that hangs up before the limit leaves no timer behind."""
    app = Source(1000)
    async with asyncio.timeout(10), serving(app, BoundedProtocol) as (port, server):
        client = connect(port)
        await until(lambda: any(c._stall for c in server.server_state.connections))  # type: ignore[union-attr]
        (connection,) = server.server_state.connections
        client.close()
        await app.left.wait()
        assert isinstance(connection, BoundedProtocol)
        assert connection._stall is None


class Pushing:
    """An application that pushes ``pieces`` until one is not taken, and tells what it was told."""

    def __init__(self, pieces: int, piece: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.pieces, self.piece, self.headers = pieces, piece, headers
        self.told: list[bool] = []
        self.pushed = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        push = scope[PUSH_KEY]
        self.told.append(push(b"before the head"))
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        for _ in range(self.pieces):
            self.told.append(push(self.piece))
            if not self.told[-1]:
                break
        self.pushed.set()
        await self.goes_on.wait()
        await send({"type": "http.response.body", "body": b""})
        self.told.append(push(b"behind the end"))


async def answer_of(port: int, requests: bytes, end: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(requests)
    try:
        return await reader.readuntil(end)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_what_is_pushed_is_part_of_the_body() -> None:
    """Between head and end every part that was taken is a chunk; before and behind them none is taken."""
    app = Pushing(2, b"twelve bytes", [])
    app.goes_on.set()
    async with asyncio.timeout(10), serving(app, PushingProtocol) as (port, _):
        answer = await answer_of(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"0\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n" + b"c\r\ntwelve bytes\r\n" * 2 + b"0\r\n\r\n")
    assert app.told == [False, True, True, False]


@pytest.mark.parametrize(
    ("method", "headers"), [(b"HEAD", []), (b"GET", [(b"content-length", b"0")])], ids=["HEAD", "of a length"]
)
async def test_no_part_is_taken_where_chunks_have_no_place(
    method: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    """Answers without a body, and bodies with a length, go the usual way."""
    app = Pushing(1, b"x", headers)
    app.goes_on.set()
    async with asyncio.timeout(10), serving(app, PushingProtocol) as (port, _):
        await answer_of(port, method + b" / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n\r\n")
        await until(lambda: len(app.told) == 3)
    assert app.told == [False, False, False]


async def test_a_request_behind_in_the_pipeline_gets_no_part_of_this_answer() -> None:
    """Parts go to the answer of the request they were pushed for, also when the next has come."""
    app = Pushing(1, b"first", [])
    app.goes_on.set()
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    async with asyncio.timeout(10), serving(app, PushingProtocol) as (port, _):
        answer = await answer_of(port, request * 2, b"0\r\n\r\nHTTP/1.1 200 OK\r\n")
        await until(lambda: len(app.told) == 6)
    assert answer.index(b"5\r\nfirst\r\n") < answer.index(b"0\r\n\r\n")
    assert app.told == [False, True, False] * 2


async def test_a_client_that_does_not_read_takes_few_parts() -> None:
    """Parts are refused as soon as the buffers are full, and when the client has gone."""
    app = Pushing(1000, PIECE, [])
    async with asyncio.timeout(10), serving(app, PushingProtocol) as (port, server):
        client = connect(port)
        await app.pushed.wait()
        assert app.told[-1] is False
        assert len(app.told) * len(PIECE) < 3 * SEND_BUFFER_BYTES + 3 * WRITE_BUFFER_BYTES
        client.close()
        await until(lambda: not server.server_state.connections)
        app.goes_on.set()
        told = len(app.told)
        await until(lambda: len(app.told) > told)
    assert app.told[-1] is False


async def test_a_request_leaves_nothing_to_the_garbage_collector() -> None:
    """What a request has in its scope goes with its answer, or with the next request at the latest."""
    seen: list[weakref.ref[asyncio.Event]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["mark"] = mark = asyncio.Event()
        seen.append(weakref.ref(mark))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert scope[PUSH_KEY](b"x")
        await send({"type": "http.response.body", "body": b""})

    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    async with asyncio.timeout(10), serving(app, PushingProtocol) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        gc.disable()
        try:
            for _ in range(2):
                writer.write(request)
                await reader.readuntil(b"\r\n0\r\n\r\n")
            await until(lambda: seen[0]() is None)
        finally:
            gc.enable()
            writer.close()
