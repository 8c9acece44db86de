"""A thousand clients that begin a request and never end it: nobody else notices, and they are sent away."""

import asyncio
import json
import resource
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests.serverprocess import ServerProcess

CLIENTS = 1000
GONE_WITHIN_S = 10.0
ANSWERED_WITHIN_S = 1.0
STARTS = (
    b"",
    b"P",
    b"POST /chat HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    b"\r\n",
)


@contextmanager
def many_files() -> Iterator[None]:
    """Let this process, and those that it starts, have as many sockets as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def hang_on(host: str, port: int, start: bytes, stack: AsyncExitStack) -> tuple[float, bytes]:
    """Begin a request; return after how many seconds the server ended it, and what it said."""
    reader, writer = await asyncio.open_connection(host, port)
    stack.callback(writer.close)
    began = time.monotonic()
    writer.write(start)
    said = await reader.read()
    return time.monotonic() - began, said


async def ask_on(server: ServerProcess, until: asyncio.Event) -> list[float]:
    """Chat one message after the other; return how long each took."""
    times = []
    while not until.is_set():
        began = time.monotonic()
        reply = await asyncio.to_thread(
            server.request, "POST", "/chat", {"session_id": "s", "message": "hello"}
        )
        assert reply.status == 200
        assert "server" not in reply.headers
        times.append(time.monotonic() - began)
    return times


def test_half_open_connections(tmp_path: Path) -> None:
    """All are closed within 10 s, those that said something with a 408; meanwhile every turn is answered."""

    async def attack(server: ServerProcess) -> tuple[list[tuple[float, bytes]], list[float]]:
        address = urlsplit(server.url)
        over = asyncio.Event()
        async with asyncio.timeout(60), AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            others = tasks.create_task(ask_on(server, over))
            slow = [
                tasks.create_task(
                    hang_on(str(address.hostname), address.port or 0, STARTS[n % len(STARTS)], stack)
                )
                for n in range(CLIENTS)
            ]
            ends = [await task for task in slow]
            over.set()
            return ends, await others

    with (
        many_files(),
        ServerProcess(tmp_path, STORE_URL="memory://", MODEL_PROVIDER="demo", OVERLOAD_LAG_MS="0") as server,
    ):
        ends, times = asyncio.run(attack(server))
    assert max(seconds for seconds, _ in ends) < GONE_WITHIN_S
    for number, (_, said) in enumerate(ends):
        if STARTS[number % len(STARTS)]:
            head, _, body = said.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b"\r\nserver:" not in head.lower()
            assert json.loads(body)["code"] == "REQUEST_TIMEOUT"
        else:
            assert said == b""
    assert len(times) > 100
    assert sorted(times)[len(times) * 99 // 100] < ANSWERED_WITHIN_S
