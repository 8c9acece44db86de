"""How requests have to arrive, seen through real sockets; the waits are shortened."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.api.arrival import BODY_STEP_BYTES, MAX_HEAD_BYTES, MAX_HEADERS, MAX_URL_BYTES, ArrivalProtocol
from app.api.body import DRAIN_S
from app.api.protocol import PushingProtocol
from tests.integration.test_protocol import serving, until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
SHORT_S = 0.2


class Hasty(PushingProtocol):
    HEAD_S = SHORT_S
    BODY_STEP_S = SHORT_S


class App:
    """Reads a whole request and says how long its body was, once ``goes_on`` is set."""

    def __init__(self, *, reads: bool = True) -> None:
        self.reads = reads
        self.asked: list[str] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["method"])
        self.scope = scope
        size, more = 0, self.reads
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            size += len(event["body"])
            more = event["more_body"]
        await self.goes_on.wait()
        body = b"%d bytes" % size
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Client:
    """One connection, and what came back on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.began = asyncio.get_running_loop().time()

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, bytes]:
        """Return status and body of the next answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return int(head.split()[1]), await self.reader.readexactly(int(length))

    async def refusal(self) -> tuple[int, str]:
        """Return status and code of the next answer, behind which nothing comes."""
        status, body = await self.answer()
        assert await self.reader.read() == b""
        return status, json.loads(body)["code"]

    @property
    def age_s(self) -> float:
        return asyncio.get_running_loop().time() - self.began


@asynccontextmanager
async def connected(app: Any, protocol: type[asyncio.Protocol] = PushingProtocol) -> AsyncIterator[Client]:
    async with asyncio.timeout(20), serving(app, protocol) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield Client(reader, writer)
        finally:
            writer.close()


async def drip(client: Client, piece: bytes) -> None:
    """Say ``piece`` again and again, until the connection ends."""
    loop = asyncio.get_running_loop()
    while not client.reader.at_eof():
        client.say(piece)
        await until(lambda due=loop.time() + SHORT_S / 10: loop.time() > due)  # type: ignore[misc]


async def test_a_silent_connection_is_closed_without_a_word() -> None:
    """Nothing was asked, so nothing is answered."""
    async with connected(App(), Hasty) as client:
        assert await client.reader.read() == b""
        assert client.age_s < 5 * SHORT_S


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\nHost", b"\r\n", b"GET /\r\n"])
async def test_half_a_head_is_waited_for_so_long(start: bytes) -> None:
    """408, and the end."""
    async with connected(App(), Hasty) as client:
        client.say(start)
        assert await client.refusal() == (408, "REQUEST_TIMEOUT")
        assert client.age_s < 5 * SHORT_S


@pytest.mark.parametrize("piece", [b"X: y\r\n", b"\r\n"])
async def test_a_head_that_drips_gets_no_more_time(piece: bytes) -> None:
    """Each byte is in time, but not the whole."""
    app = App()
    async with connected(app, Hasty) as client:
        client.say(b"" if piece == b"\r\n" else b"GET / HTTP/1.1\r\nHost: x\r\n")
        dripping = asyncio.ensure_future(drip(client, piece))
        assert await client.refusal() == (408, "REQUEST_TIMEOUT")
        assert client.age_s < 5 * SHORT_S + DRAIN_S
        await dripping
    assert app.asked == []


async def test_the_second_request_has_its_own_time() -> None:
    """A connection that is kept alive may rest; from the first byte on the head has to come."""
    async with connected(App(), Hasty) as client:
        for _ in range(3):
            client.say(GET)
            assert await client.answer() == (200, b"0 bytes")
            await until(lambda due=client.age_s + 1.5 * SHORT_S: client.age_s > due)  # type: ignore[misc]
        client.say(GET[:10])
        assert await client.refusal() == (408, "REQUEST_TIMEOUT")


@pytest.mark.parametrize("head", [POST % 100_000, GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"])
async def test_a_body_that_stops_is_not_waited_for(head: bytes) -> None:
    """408, to whom the application has not answered yet."""
    async with connected(App(), Hasty) as client:
        client.say(head + b"1\r\nx\r\n")
        assert await client.refusal() == (408, "REQUEST_TIMEOUT")


async def test_a_body_that_drips_is_not_waited_for() -> None:
    """A few bytes are no progress."""
    async with connected(App(), Hasty) as client:
        client.say(POST % 100_000)
        dripping = asyncio.ensure_future(drip(client, b"x"))
        assert await client.refusal() == (408, "REQUEST_TIMEOUT")
        assert client.age_s < 5 * SHORT_S + DRAIN_S
        await dripping


async def send_steadily(client: Client, size: int, steps: float) -> None:
    """Send ``size`` bytes so that they take about so many of the steps that a body has."""
    loop = asyncio.get_running_loop()
    pieces = int(steps * 8)
    for _ in range(pieces):
        client.say(b"x" * (size // pieces))
        await until(lambda due=loop.time() + SHORT_S / 8: loop.time() > due)  # type: ignore[misc]


async def test_a_slow_body_arrives() -> None:
    """As long as enough of it comes in every step."""
    size = 24 * (BODY_STEP_BYTES // 3)
    async with connected(App(), Hasty) as client:
        client.say(POST % size)
        await send_steadily(client, size, 3)
        assert await client.answer() == (200, b"%d bytes" % size)


async def test_no_body_takes_for_ever() -> None:
    """However steadily it comes."""

    class Strict(Hasty):
        BODY_STEPS = 2

    async with connected(App(), Strict) as client:
        client.say(POST % 10_000_000)
        await send_steadily(client, 100 * BODY_STEP_BYTES, 3)
        assert await client.refusal() == (408, "REQUEST_TIMEOUT")


async def test_the_rest_of_a_body_that_nobody_wants_has_no_time_either() -> None:
    """The request was answered before it had come; the connection ends without another answer."""
    async with connected(App(reads=False), Hasty) as client:
        client.say(POST % 100_000)
        assert await client.answer() == (200, b"0 bytes")
        assert await client.reader.read() == b""


async def test_what_comes_behind_a_running_answer_waits_for_it() -> None:
    """Half a request, or a slow body, does not cut the answer before it; its own time comes then."""
    for behind in (GET[:10], POST % 100 + b"x"):
        app = App()
        app.goes_on.clear()
        async with connected(app, Hasty) as client:
            client.say(GET + behind)
            await until(lambda now=client.age_s: client.age_s > now + 3 * SHORT_S)  # type: ignore[misc]
            app.goes_on.set()
            assert await client.answer() == (200, b"0 bytes")
            assert await client.refusal() == (408, "REQUEST_TIMEOUT")


@pytest.mark.parametrize("behind", [b"\x16\x03\x01", b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000])
async def test_garbage_does_not_take_the_answer_before_it(behind: bytes) -> None:
    """What came first is answered first; then it is said that the rest was none."""
    app = App()
    app.goes_on.clear()
    async with connected(app) as client:
        client.say(GET + behind)
        await until(lambda: bool(app.asked))
        client.say(behind)
        app.goes_on.set()
        assert await client.answer() == (200, b"0 bytes")
        assert (await client.refusal())[0] in (400, 431)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/3.7\r\nHost: x\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        POST % 3 + b"GET / HTTP/1.1\r\n",
        POST % 3 + b"abcCONNECT a:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_garbage_is_told_so(request_: bytes) -> None:
    """400 as a problem document, then the end."""
    async with connected(App()) as client:
        client.say(request_)
        if request_.startswith(b"POST"):
            assert await client.answer() == (200, b"3 bytes")
        assert await client.refusal() == (400, "MALFORMED_REQUEST")


async def test_broken_chunks_are_told_so() -> None:
    """The application that waits for them is told that nothing comes."""
    app = App()
    async with connected(app) as client:
        client.say(GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert await client.refusal() == (400, "MALFORMED_REQUEST")
    assert app.asked == ["GET"]


def head_of(size: int) -> bytes:
    """Return a request whose header fields have that many bytes."""
    return b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (size - len("Host: x\r\nX: \r\n")) + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("fits", "does_not", "refusal"),
    [
        (head_of(MAX_HEAD_BYTES), head_of(MAX_HEAD_BYTES + 1), (431, "HEAD_TOO_LARGE")),
        (
            GET[:-2] + b"X: y\r\n" * (MAX_HEADERS - 1) + b"\r\n",
            GET[:-2] + b"X: y\r\n" * MAX_HEADERS + b"\r\n",
            (431, "HEAD_TOO_LARGE"),
        ),
        (
            GET.replace(b"/", b"/" * MAX_URL_BYTES, 1),
            GET.replace(b"/", b"/" * (MAX_URL_BYTES + 1), 1),
            (414, "URI_TOO_LONG"),
        ),
    ],
    ids=["bytes", "fields", "address"],
)
async def test_the_size_of_a_head(fits: bytes, does_not: bytes, refusal: tuple[int, str]) -> None:
    """Exactly so much and no more; the same when it comes behind a large body, in one piece or in many."""
    large = POST % 300_000 + b"x" * 300_000
    for pieces in ([fits], [large + fits], [fits[at : at + 999] for at in range(0, len(fits), 999)]):
        async with connected(App()) as client:
            for piece in pieces:
                client.say(piece)
                await client.writer.drain()
            for expected in (b"300000 bytes", b"0 bytes")[len(pieces[0]) < 300_000 :]:
                assert await client.answer() == (200, expected)
    for pieces in ([does_not], [does_not[at : at + 999] for at in range(0, len(does_not), 999)]):
        async with connected(App()) as client:
            for piece in pieces:
                client.say(piece)
            assert await client.refusal() == refusal


@pytest.mark.parametrize(
    ("start", "refusal"),
    [(b"GET /", (414, "URI_TOO_LONG")), (b"GET / HTTP/1.1\r\nX: ", (431, "HEAD_TOO_LARGE"))],
)
async def test_an_endless_head_is_cut(start: bytes, refusal: tuple[int, str]) -> None:
    """Refused while it comes, and the refusal is read although the client goes on sending."""
    async with connected(App()) as client:
        client.say(start)
        for _ in range(200):
            client.say(b"a" * 50_000)
        assert await client.refusal() == refusal


CHUNKED = GET[:-2] + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"


async def test_trailers_are_no_headers() -> None:
    """What comes behind a body changes nothing of what came before it, and is not kept."""
    app = App()
    async with connected(app) as client:
        client.say(CHUNKED + b"0\r\nX-Evil: 1\r\nIf-Match: x\r\n\r\n" + GET * 2)
        for expected in (b"3 bytes", b"0 bytes", b"0 bytes"):
            assert await client.answer() == (200, expected)
        client.say(CHUNKED + b"0\r\nX-Evil: 1\r\n\r\n")
        assert await client.answer() == (200, b"3 bytes")
    assert [name for name, _ in app.scope["headers"]] == [b"host", b"transfer-encoding"]


@pytest.mark.parametrize("trailer", [b"X: y\r\n", b"X: " + b"y" * 997], ids=["many", "long"])
async def test_endless_trailers_are_cut(trailer: bytes) -> None:
    """They would be kept until the last of them has come."""
    async with connected(App()) as client:
        client.say(CHUNKED + b"0\r\n" + trailer)
        await client.writer.drain()
        for _ in range(400):
            client.say(trailer.removeprefix(b"X: ") if len(trailer) > 100 else trailer * 100)
            await asyncio.sleep(0)
        assert await client.refusal() == (431, "HEAD_TOO_LARGE")


async def test_line_ends_before_any_request_are_cut() -> None:
    """There is no request yet, but there is an end to what may come before one."""
    async with connected(App()) as client:
        for _ in range(100):
            client.say(b"\r\n" * 1000)
            await asyncio.sleep(0)
        assert await client.refusal() == (431, "HEAD_TOO_LARGE")


@pytest.mark.parametrize("body", [b"", b"hello"])
async def test_another_protocol_is_not_spoken(body: bytes) -> None:
    """A request that offers one is answered in this one, with its body, and so is the next."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    async with connected(App()) as client:
        for _ in range(2):
            for pieces in ([(POST % len(body))[:-2] + offer + body], [(POST % len(body))[:-2] + offer, body]):
                for piece in pieces:
                    client.say(piece)
                    await client.writer.drain()
                assert await client.answer() == (200, b"%d bytes" % len(body))


async def test_a_thousand_offers_in_one_piece() -> None:
    """Each is answered, in order, and at no great cost."""
    offer = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    app = App()
    async with connected(app) as client:
        client.say(offer * 1000)
        for _ in range(1000):
            assert await client.answer() == (200, b"0 bytes")
        assert client.age_s < 5


async def test_a_long_answer_has_all_its_time() -> None:
    """Deadlines are for what the client sends; a connection that is answering has none of them."""
    app = App()
    app.goes_on.clear()
    async with asyncio.timeout(10), serving(app, Hasty) as (port, server):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = Client(reader, writer)
        client.say(GET)
        await until(lambda: client.age_s > 3 * SHORT_S)
        (connection,) = server.server_state.connections
        assert isinstance(connection, Hasty)
        assert connection._rest is None
        app.goes_on.set()
        assert await client.answer() == (200, b"0 bytes")
        writer.close()


def test_the_figures_are_those_that_are_promised() -> None:
    """Half a head goes within 10 s, a body that drips in 30 s, any body within 5 minutes."""
    assert ArrivalProtocol.HEAD_S < 10
    assert ArrivalProtocol.BODY_STEP_S == 30
    assert ArrivalProtocol.BODY_STEP_S * ArrivalProtocol.BODY_STEPS == 300
