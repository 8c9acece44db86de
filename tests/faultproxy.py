"""A TCP proxy of our own that does to a connection what networks do.

with FaultProxy(6379) as proxy:                     # to 127.0.0.1:6379
    connect("127.0.0.1", proxy.port)
    proxy.inflict(BLACK_HOLE)                       # on all connections, those to come too
    proxy.inflict(latency(0.2), on=proxy.links[0])  # on one
    proxy.heal()                                    # pass everything on

It runs on a thread of its own, and every call returns when what it says is so. What was lost
stays lost: a connection that has lost bytes is reset when its fault is over.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self

HOST = "127.0.0.1"
_ANSWER_S = 10


@dataclass(frozen=True)
class Fault:
    """What happens to a connection."""

    name: str
    delay_s: float = 0.0

    def __str__(self) -> str:
        return self.name


PASS = Fault("pass")
BLACK_HOLE = Fault("black hole")
"""Accepts and reads, and says nothing, whatever happens behind it."""
HOLD = Fault("hold")
"""The same, but what was read arrives when it is over, though its sender may have left long ago."""
SWALLOW_REPLIES = Fault("swallow replies")
"""Passes requests on, and loses the answers."""
RESET = Fault("reset")
"""Resets what is connected, and what connects."""
REFUSE = Fault("refuse")
"""Resets what is connected, and nobody listens."""

_LOSING = (BLACK_HOLE, SWALLOW_REPLIES)


def latency(delay_s: float) -> Fault:
    """Return the fault that everything takes ``delay_s`` longer, in each direction."""
    return Fault("latency", delay_s)


class FaultProxy:
    """Listens on a free port of ``HOST`` and passes on to ``port`` there."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.port = 0
        self._fault = PASS
        self._links: dict[int, _Link] = {}
        self._accepted = 0
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._do(self._switch(REFUSE, None))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    @property
    def accepted(self) -> int:
        """How many connections there have been."""
        return self._accepted

    @property
    def links(self) -> list[int]:
        """The numbers of the connections that are open, oldest first."""
        return sorted(self._links)

    def inflict(self, fault: Fault, *, on: int | None = None) -> None:
        """Let ``fault`` happen from now on: to the connection of that number, or to all, also to come."""
        self._do(self._switch(fault, on))

    def heal(self) -> None:
        """Pass everything on again."""
        self.inflict(PASS)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_ANSWER_S)

    async def _listen(self) -> None:
        self._server = await self._loop.create_server(self._accept, HOST, self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _switch(self, fault: Fault, on: int | None) -> None:
        if on is not None:
            self._links[on].switch(fault)
            return
        self._fault = fault
        for link in list(self._links.values()):
            link.switch(fault)
        if fault is REFUSE and self._server is not None:
            self._server.close()
            self._server = None
        elif fault is not REFUSE and self._server is None:
            await self._listen()

    def _accept(self) -> asyncio.Protocol:
        self._accepted += 1
        number = self._accepted
        link = _Link(self._loop, self._fault, self._target, lambda: self._links.pop(number, None))
        self._links[number] = link
        return link.client


class _Link:
    """One connection of a client and the one behind it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fault: Fault, target: int, on_end: Callable[[], object]
    ) -> None:
        self._loop = loop
        self._fault = fault
        self._target = target
        self._on_end = on_end
        self._has_lost = False
        self._held: list[tuple[_End, bytes | None]] = []
        self._connecting: asyncio.Task[None] | None = None
        self.client = _End(self)
        self.server = _End(self)

    def begin(self, end: "_End") -> None:
        if end is self.client:
            if self._fault in (RESET, REFUSE):
                self.reset()
            else:
                self._connecting = self._loop.create_task(self._connect())

    def switch(self, fault: Fault) -> None:
        self._fault = fault
        if fault in (RESET, REFUSE) or (self._has_lost and fault not in _LOSING):
            self.reset()
        elif fault is not HOLD:
            held, self._held = self._held, []
            for end, data in held:
                self._deliver(end, data)

    def carry(self, source: "_End", data: bytes | None) -> None:
        """Do with what came from ``source`` as is the fault; ``None``: it has closed."""
        other = self.server if source is self.client else self.client
        fault = self._fault
        if fault is BLACK_HOLE or (fault is SWALLOW_REPLIES and source is self.server):
            self._has_lost = True
        elif fault is HOLD:
            self._held.append((other, data))
        else:
            self._send(other, data, fault.delay_s)

    def end(self, source: "_End", *, is_reset: bool) -> None:
        if is_reset and self._fault is PASS:
            self.reset()
        else:
            self.carry(source, None)

    def reset(self) -> None:
        self._on_end()
        if self._connecting is not None:
            self._connecting.cancel()
        for end in (self.client, self.server):
            end.reset()

    async def _connect(self) -> None:
        try:
            await self._loop.create_connection(lambda: self.server, HOST, self._target)
        except OSError:
            self.reset()

    def _send(self, end: "_End", data: bytes | None, delay_s: float) -> None:
        if not delay_s and not end.on_the_way:
            self._deliver(end, data)
            return
        # Behind what is still on its way, though that may be slower.
        end.due = max(end.due + 1e-6, self._loop.time() + delay_s)
        end.on_the_way += 1
        self._loop.call_at(end.due, self._arrive, end, data)

    def _arrive(self, end: "_End", data: bytes | None) -> None:
        end.on_the_way -= 1
        self._deliver(end, data)

    def _deliver(self, end: "_End", data: bytes | None) -> None:
        end.take(data)
        if data is None:
            self._on_end()


class _End(asyncio.Protocol):
    def __init__(self, link: _Link) -> None:
        self._link = link
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes | None] = []
        self._is_reset = False
        self.due = 0.0
        self.on_the_way = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        early, self._early = self._early, []
        for data in early:
            self.take(data)
        self._link.begin(self)

    def data_received(self, data: bytes) -> None:
        self._link.carry(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_reset:
            self._link.end(self, is_reset=exc is not None)

    def take(self, data: bytes | None) -> None:
        if self._transport is None:
            self._early.append(data)
        elif data is None:
            self._transport.close()
        elif not self._transport.is_closing():
            self._transport.write(data)

    def reset(self) -> None:
        self._is_reset = True
        if self._transport is not None:
            made = self._transport.get_extra_info("socket")
            if made is not None and not self._transport.is_closing():
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
