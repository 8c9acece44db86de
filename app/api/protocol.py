"""One HTTP connection, as uvicorn with httptools has it, and what its client may cost.

A client that does not read is closed; until then it holds a few tens of KiB here and at
most 256 KB in the kernel. uvicorn alone would wait for ever, with up to 4 MB of kernel
memory for each connection. How its requests have to arrive is in ``app.api.arrival``.

These limits come with ``app.server``, which gives this class to uvicorn and passes its
listener to ``limit_send_buffer``. Under someone else's uvicorn (an embedded
``create_app``) they are absent, unless it does the same.
"""

import asyncio
import logging
import socket
import struct
import weakref
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.api.arrival import ArrivalProtocol
from app.api.push import PUSH_KEY
from app.api.shedding import is_refused_at_once
from app.services.overload import Gate

# Linux doubles it for its own bookkeeping, and may go beyond that by one packet of 64 KiB.
SEND_BUFFER_BYTES = 64 * 1024
WRITE_BUFFER_BYTES = 16 * 1024
ANY_REFUSAL_BYTES = 1 << 20  # beside what was there: it repeats the path and the origin, of 80 KiB at most
_RESET = struct.pack("ii", 1, 0)

_log = logging.getLogger(__name__)


class BoundedProtocol(ArrivalProtocol):
    """A connection that is cut when its client stalls.

    While writing is paused the client has to take ``WRITE_BUFFER_BYTES`` in every
    ``STALLED_S``, or all there is.
    """

    STALLED_S = 30.0
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_stall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_progress()

    def resume_writing(self) -> None:
        self._forget_stall()
        super().resume_writing()

    def _await_progress(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(self.STALLED_S, self._check_progress, unsent)

    def _check_progress(self, unsent_before: int) -> None:
        if unsent_before - self.transport.get_write_buffer_size() >= WRITE_BUFFER_BYTES:
            self._await_progress()  # slow, but it reads: one large answer may take long
            return
        _log.info("closed a connection whose client did not read for %g s", self.STALLED_S)
        self._stall = None
        # With a reset: after a mere close the kernel would keep what it holds, and try on.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


class SheddingProtocol(BoundedProtocol):
    """A connection on which turns are refused in the step in which they come, while there is an overload.

    A task of its own would be in line behind a round of the event loop's work, and so would what it
    writes: refused like this, a request waits for no more than one round, and costs a third less.
    """

    _gate: Gate | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._gate = getattr(getattr(self.app, "state", None), "gate", None)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if (
            self._gate is None
            or self.pipeline  # its answer would begin the next one: as deep as the pipeline is long
            or cycle.flow.write_paused
            or not is_refused_at_once(cast(dict[str, Any], cycle.scope), self._gate)
        ):
            super()._start_asgi_task(cycle, app)
            return
        refusing = cycle.run_asgi(app)
        # A client that does not read would make it wait for room before its end; the connection is
        # paused behind it instead.
        self.transport.set_write_buffer_limits(high=ANY_REFUSAL_BYTES)
        try:
            refusing.send(None)
        except StopIteration:
            return
        finally:
            self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        raise AssertionError("a refusal waits for nothing")


class PushingProtocol(SheddingProtocol):
    """A connection that offers its requests a ``Push``.

    Only for an application of which no middleware changes bodies on their way.
    """

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        # Its task has not run yet. The next request of a pipeline has a cycle of its own.
        if self.cycle is not None and self.cycle.scope is self.scope:
            # Not the cycle itself, which has the scope: a ring would be left to the garbage collector.
            cast(dict[str, Any], self.scope)[PUSH_KEY] = partial(_push, weakref.ref(self.cycle))


def _push(request: "weakref.ref[RequestResponseCycle]", body: bytes) -> bool:
    cycle = request()
    # Whether there are chunks is decided with the head.
    if cycle is None or not cycle.chunked_encoding or cycle.response_complete:
        return False
    if cycle.disconnected or cycle.flow.write_paused:
        return False
    if body:  # an empty chunk would be the end
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True


def limit_send_buffer(listener: socket.socket) -> None:
    """Bound the kernel's send buffer of every connection that ``listener`` accepts from now on."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
