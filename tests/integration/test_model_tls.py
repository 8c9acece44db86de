"""The lean client and TLS: a server that can be verified is asked, any other is told nothing.

``localhost.pem`` certifies ``localhost`` and 127.0.0.1 from 2020 to 2120, and signs itself; its
key, ``localhost.key.pem``, protects nothing. OpenSSL 3.0 made both, with an empty ``index`` and
``01`` in ``serial``::

    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -subj /CN=localhost \
        -keyout localhost.key.pem -out request.pem
    openssl ca -config ca.cnf -batch -notext -selfsign -keyfile localhost.key.pem \
        -startdate 20200101000000Z -enddate 21200101000000Z -in request.pem -out localhost.pem

where ``ca.cnf`` has ``default_md=sha256`` and the extensions ``basicConstraints=critical,CA:TRUE``,
``keyUsage=critical,digitalSignature,keyCertSign``, ``extendedKeyUsage=serverAuth``,
``subjectKeyIdentifier=hash`` and ``subjectAltName=DNS:localhost,IP:127.0.0.1``.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pytest
import uvloop

from app.domain.errors import ModelUnavailable
from app.domain.events import TextDelta
from app.domain.turn import text_of
from app.models.providers import make_provider
from app.models.registry import ModelRegistry
from tests.modelserver import ModelServer
from tests.unit.agents.making import KEY, make_agent, run

CERTIFICATE = Path(__file__).with_name("localhost.pem")
PRIVATE_KEY = Path(__file__).with_name("localhost.key.pem")
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Relay:
    """Listens, and passes what comes on every connection to ``port``, and back."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self._target = port
        self._context = context
        self._talks: set[asyncio.Task[Any]] = set()
        self.opened = 0  # with TLS: after the handshake

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.gather(*self._talks)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        await self._greet(reader, writer)
        upstream, downstream = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(_pass(reader, downstream), _pass(upstream, writer))

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pass


class Terminator(Relay):
    """Speaks TLS to whoever comes, and plain HTTP to the model server."""

    def __init__(self, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE, PRIVATE_KEY)
        context.set_alpn_protocols(["h2", "http/1.1"])
        context.sni_callback = self._note_name
        super().__init__(port, context)
        self.asked_for: list[str | None] = []  # the name in each handshake that was begun

    def _note_name(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        self.asked_for.append(name)


class Tunnel(Relay):
    """An HTTP proxy that leads to one place, whatever it is asked for."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.heads: list[bytes] = []

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while part := await reader.read(65_536):
            writer.write(part)
            await writer.drain()
    writer.close()


@pytest.fixture(scope="module")
def model_server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def server(model_server: ModelServer) -> ModelServer:
    model_server.reset()
    return model_server


@pytest.fixture(params=LOOPS)
def on_loop(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Run a test on the loop that it is served on, and on the other; each is bounded."""

    def run(test: Coroutine[Any, Any, None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(5):
                await test

        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(bounded())

    return run


@asynccontextmanager
async def models_at(host: str, port: int, **limits: Any) -> AsyncIterator[ModelRegistry]:
    provider = make_provider("secure", base_url=f"https://{host}:{port}/v1", model="m", api_key=KEY)
    models = ModelRegistry([provider], "secure", **{"retry_base_s": 0.001} | limits)
    try:
        yield models
    finally:
        await models.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
@pytest.mark.parametrize("way", ["directly", "through a proxy"])
def test_a_verified_server_is_asked(
    on_loop: Any, server: ModelServer, monkeypatch: pytest.MonkeyPatch, host: str, way: str
) -> None:
    """The answer streams, the connection is kept, and the key is shown to the server alone."""
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    long = "long " * 50_000  # many TLS records
    server.script(
        {"mode": "text", "text": "one by one", "chunks": 5, "delay_s": 0.05},
        {"mode": "text", "text": long, "chunks": 2},
    )

    async def test() -> None:
        async with Terminator(server.port) as secure, Tunnel(secure.port) as tunnel:
            if way == "through a proxy":
                monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{tunnel.port}")
            async with models_at(host, secure.port) as models:
                first, events = await run(make_agent(models), "hello")
                second, _ = await run(make_agent(models), "hello" * 50_000)
        assert (text_of(first.messages), text_of(second.messages)) == ("one by one", long)
        assert sum(isinstance(event, TextDelta) for event in events) > 1
        assert (secure.opened, secure.asked_for) == (1, [host if host == "localhost" else None])
        assert [head["authorization"] for head in server.headers()] == [f"Bearer {KEY}"] * 2
        target = f"{host}:{secure.port}"
        asked = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()
        assert tunnel.heads == ([asked] if way == "through a proxy" else [])

    on_loop(test())


@pytest.mark.parametrize("way", ["directly", "through a proxy"])
@pytest.mark.parametrize(
    ("is_trusted", "host"),
    [
        (False, "localhost"),
        (True, "127.1"),  # leads to 127.0.0.1, but the certificate does not say so
    ],
    ids=["no trust", "another name"],
)
def test_a_server_that_cannot_be_verified_is_told_nothing(
    on_loop: Any, server: ModelServer, monkeypatch: pytest.MonkeyPatch, way: str, is_trusted: bool, host: str
) -> None:
    """The turn fails before a byte of its request is sent; what a proxy is trusted for is its own."""
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))

    async def test() -> None:
        async with Terminator(server.port) as secure, Tunnel(secure.port) as tunnel:
            if way == "through a proxy":
                monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{tunnel.port}")
            async with models_at(host, secure.port, attempts=2) as models:
                with pytest.raises(ModelUnavailable) as caught:
                    await run(make_agent(models), "hello")
        assert caught.value.code == "MODEL_UNAVAILABLE"
        assert (secure.opened, secure.asked_for) == (0, [host] * 2)
        assert len(tunnel.heads) == (2 if way == "through a proxy" else 0)
        assert KEY.encode() not in b"".join(tunnel.heads)
        assert server.requests() == []

    on_loop(test())


@pytest.mark.parametrize("way", ["directly", "through a proxy"])
def test_a_server_that_shakes_no_hands(on_loop: Any, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Who accepts a connection and stays silent has the time for a connection, not for an answer."""

    async def test() -> None:
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            said = await reader.read()
            writer.close()
            await writer.wait_closed()
            heard.put_nowait(said)

        silent = await asyncio.start_server(listen, "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        try:
            if way == "through a proxy":
                monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
            async with models_at("localhost", port, attempts=1, connect_timeout_s=0.1) as models:
                with pytest.raises(ModelUnavailable):
                    await run(make_agent(models), "hello")
            assert KEY.encode() not in await heard.get()
        finally:
            silent.close()

    on_loop(test())
