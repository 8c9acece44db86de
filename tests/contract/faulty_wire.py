"""A proxy before a real server, which loses replies when it is told to, and lets connections wait."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class FaultyWire:
    """``swallow``: the next request is forwarded, its reply is not, and the connection ends.

    ``meanwhile`` is done before it does. Connections get no further than ``gate`` until that is set.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.swallow = False
        self.swallowed = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FaultyWire"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await server.wait_closed()

    def cut(self) -> None:
        """End every connection, replies that are due or not."""
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.gate.wait()
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, back}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, back))
                group.create_task(self._return(there, writer))
        except* (OSError, EOFError):
            pass
        finally:
            for one in (writer, back):
                one.close()
                self._writers.discard(one)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        raise EOFError

    async def _return(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if self.swallow:
                self.swallow = False
                self.swallowed += 1
                if self.meanwhile is not None:
                    await self.meanwhile()
                raise EOFError
            writer.write(data)
            await writer.drain()
        raise EOFError
