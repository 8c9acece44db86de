"""The HTTP client that the lean wire has, against servers that say what a test makes them say."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from app.domain.errors import ModelUnavailable
from app.models import http
from app.models.address import Address
from app.models.http import Connection, Connections, Garbled
from app.models.providers import make_provider
from app.models.proxy import Proxy, find_proxy
from app.models.registry import ModelRegistry

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nRetry-After: 7\r\nX-Other: x\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Listener:
    """An exchange that notes what it is told."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.parts: list[bytes] = []
        self.ends: list[Exception | None] = []
        self.ended = asyncio.Event()

    def take_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status, self.headers = status, headers

    def take_body(self, part: bytes) -> None:
        self.parts.append(part)

    def take_end(self, error: Exception | None) -> None:
        self.ends.append(error)
        self.ended.set()


class Server:
    """Answers each request on a connection with the next of ``answers``; after the last it closes."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []
        self.opened = 0
        self.gone = asyncio.Event()  # a client has closed its end

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        address = Address.of(f"http://127.0.0.1:{self.port}/v1")
        self.pool = Connections(address, None, 5.0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pool.close()
        self._server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            while self.answers:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(self.answers.pop(0))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()

    async def ask(self) -> Listener:
        """Make one exchange to its end."""
        listener = Listener()
        connection = self.pool.take_nowait() or await self.pool.connect()
        connection.send(b"POST / HTTP/1.1\r\n\r\n", listener)
        await listener.ended.wait()
        connection.leave(listener)
        return listener


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def on_loop(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Run a test on the loop that it is served on, and on the other."""

    def run(test: Coroutine[Any, Any, None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(5):
                await test

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(bounded())

    return run


def test_a_connection_is_used_again(on_loop: Any) -> None:
    """Two exchanges one after the other share one; the headers that matter are told, in lower case."""

    async def test() -> None:
        async with Server(OK, OK, OK) as server:
            first, second = await server.ask(), await server.ask()
            assert (server.opened, first.status, first.parts, second.parts) == (1, 200, [b"hi"], [b"hi"])
            assert first.headers == {b"content-length": b"2", b"retry-after": b"7"}
            assert first.ends == second.ends == [None]

    on_loop(test())


@pytest.mark.parametrize(
    "answer",
    [OK.replace(b"200 OK", b"200 OK\r\nConnection: close"), OK + OK, OK + b"rubbish", OK + b"HTTP/1.1 2"],
)
def test_what_cannot_be_used_again_is_not(on_loop: Any, answer: bytes) -> None:
    """A server that closes, or says more than it was asked, has its next exchange somewhere else."""

    async def test() -> None:
        async with Server(answer, OK, OK) as server:
            first, second = await server.ask(), await server.ask()
            assert (first.ends, second.ends, second.parts) == ([None], [None], [b"hi"])
            assert server.opened == 2

    on_loop(test())


def test_what_comes_later_than_its_answer_closes_the_connection(on_loop: Any) -> None:
    """A second answer to one request is never taken for the answer to the next."""

    async def test() -> None:
        async with Server(OK, OK) as server:
            listener = Listener()
            connection = await server.pool.connect()
            connection.send(b"POST / HTTP/1.1\r\n\r\n", listener)
            await listener.ended.wait()
            connection._transport.write(b"more\r\n\r\n")  # has the server say more, unasked
            await connection.closed
            assert server.pool.take_nowait() is None
            assert listener.parts == [b"hi"]

    on_loop(test())


def test_chunks_that_arrive_together_are_one_part(on_loop: Any) -> None:
    """One read of the socket is one part, whatever the server cut it into."""

    async def test() -> None:
        async with Server(CHUNKED + b"1\r\na\r\n" * 50 + b"0\r\n\r\n", OK) as server:
            assert (await server.ask()).parts == [b"a" * 50]

    on_loop(test())


def test_an_interim_answer_is_none(on_loop: Any) -> None:
    """100 and 103 come before the answer, and are passed over."""

    async def test() -> None:
        early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nRetry-After: 9\r\n\r\n"
        async with Server(early + OK, OK) as server:
            listener = await server.ask()
            assert (listener.status, listener.parts, listener.ends) == (200, [b"hi"], [None])
            assert listener.headers[b"retry-after"] == b"7"

    on_loop(test())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nhi", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", OSError),
        (CHUNKED + b"2\r\nhi\r\n", OSError),
        (CHUNKED + b"2\r\nhi\r\nrubbish", OSError),
        (b"", OSError),
        (b"HTTP/1.1 200", OSError),
        (b"SSH-2.0-OpenSSH\r\n\r\n", Garbled),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", Garbled),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, Garbled),
    ],
)
def test_how_answers_end(on_loop: Any, answer: bytes, error: type[Exception] | None) -> None:
    """A body without a length ends with its connection; any other end that is early is told, once."""

    async def test() -> None:
        async with Server(answer) as server:
            (end,) = (await server.ask()).ends
            assert end is None if error is None else isinstance(end, error)
            assert server.pool.take_nowait() is None

    on_loop(test())


def test_who_leaves_is_told_nothing_more(on_loop: Any) -> None:
    """An exchange that is left before its end closes its connection, and the other end sees that."""

    async def test() -> None:
        async with Server(CHUNKED, OK) as server:
            listener = Listener()
            connection = await server.pool.connect()
            connection.send(b"POST / HTTP/1.1\r\n\r\n", listener)
            connection.leave(listener)
            await server.gone.wait()
            await connection.closed
            assert listener.ends == []

    on_loop(test())


def test_idle_connections_are_closed(on_loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has used for a while goes without being asked for."""
    monkeypatch.setattr(http, "_IDLE_S", 0.01)

    async def test() -> None:
        async with Server(OK, OK) as server:
            await server.ask()
            await server.gone.wait()
            assert server.pool.take_nowait() is None

    on_loop(test())


def test_closing_fails_what_is_under_way(on_loop: Any) -> None:
    """Whoever waits for an answer is told that there will be none."""

    async def test() -> None:
        async with Server(CHUNKED, OK) as server:
            listener = Listener()
            connection: Connection = await server.pool.connect()
            connection.send(b"POST / HTTP/1.1\r\n\r\n", listener)
            await server.pool.close()
            assert isinstance(listener.ends[0], OSError)

    on_loop(test())


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("http://model:80/v1", "model", "/v1"),
        ("https://model:443", "model", "/"),
        ("https://model:8443/v1?a=b c", "model:8443", "/v1?a=b%20c"),
        ("http://[::1]:11434/v1", "[::1]:11434", "/v1"),
        ("http://münchen.example/ü", "xn--mnchen-3ya.example", "/%C3%BC"),
        ("http://a:b@model/\r\nX: y", "model", "/X:%20y"),
    ],
)
def test_addresses(url: str, authority: str, path: str) -> None:
    """Of a URL comes what a request may carry: no other bytes, default ports left out."""
    address = Address.of(url)
    assert (address.authority, address.path) == (authority, path)


@pytest.mark.parametrize("url", ["http://", "http://:80/v1", "http://model:99999", "http://model:x"])
def test_an_address_that_is_none(url: str) -> None:
    """It is refused when a provider is made, in words."""
    with pytest.raises(ValueError, match="provider x: base_url"):
        make_provider("x", base_url=url, model="m")


def test_the_proxy_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one for the scheme, unless the host is excepted; one that we cannot speak to is none."""
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pass%21@proxy:3128")
    monkeypatch.setenv("NO_PROXY", "inner.example")
    found = find_proxy(Address.of("https://model/v1"))
    assert found == Proxy(host="proxy", port=3128, credentials="Basic bWU6cGFzcyE=")
    assert find_proxy(Address.of("https://inner.example/v1")) is None
    assert find_proxy(Address.of("http://model/v1")) is None
    monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy:1")
    assert find_proxy(Address.of("https://model/v1")) is None


async def test_a_plain_request_goes_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the whole URL and carries the proxy's credentials beside the provider's."""
    async with Server(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n") as server:
        monkeypatch.setenv("HTTP_PROXY", f"http://me:pass@127.0.0.1:{server.port}")
        provider = make_provider("x", base_url="http://model.example/v1", model="m", api_key="k")
        models = ModelRegistry([provider], "x", attempts=1)
        with pytest.raises(ModelUnavailable):
            await models.client_for("x", "m", {}).create([])
        await models.close()
    first, *headers = server.requests[0].split(b"\r\n")
    assert first == b"POST http://model.example/v1/chat/completions HTTP/1.1"
    known = {b"Authorization: Bearer k", b"Proxy-Authorization: Basic bWU6cGFzcw=="}
    assert {b"Host: model.example", *known} < set(headers)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 Connection established\r\n\r\nnot TLS", OSError),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", ConnectionRefusedError),
        (b"HTTP/1.1 200", ConnectionRefusedError),
    ],
)
def test_a_secure_request_goes_through_a_tunnel(on_loop: Any, answer: bytes, error: type[OSError]) -> None:
    """The proxy is asked for the provider's host and port, and shown no key; then TLS begins."""

    async def test() -> None:
        async with Server(answer) as server:
            proxy = Proxy(host="127.0.0.1", port=server.port)
            pool = Connections(Address.of("https://model.example/v1"), proxy, 5.0)
            with pytest.raises(error):
                await pool.connect()
            assert server.requests[0] == (
                b"CONNECT model.example:443 HTTP/1.1\r\nHost: model.example:443\r\n\r\n"
            )

    on_loop(test())
