"""Server-sent events over a turn's log; plain ASGI.

A watcher is a position in the log. Frames are encoded once per event and face and kept
beside the events, so that any number of watchers share them. A watcher that is behind
gets several whole events in one write, and holds no more than that write.

Where the server offers it (``app.api.push``), an event is written to its watchers in the step
in which it is logged. The response's task sleeps until something has to be waited for.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.departure import ClientLeft, client_watched
from app.api.push import PUSH_KEY, Push
from app.domain.events import TurnEvent, TurnFailed
from app.services.turn_log import TurnLog, Watch

MEDIA_TYPE = "text/event-stream"
RETRY = b"retry: 2000\n\n"
HEARTBEAT = b": still here\n\n"
WRITE_BYTES = 16 * 1024  # with the transport's own buffer, what one watcher that stalls holds
_HEADERS = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Numbered = tuple[int, TurnEvent]


class Encoder(Protocol):
    """One face's dialect. ``face`` names its frames in ``TurnLog.frames``."""

    face: str

    def encode(self, turn_id: str, seq: int, event: TurnEvent) -> bytes:
        """Return one whole frame. Only that of a ``TurnFailed`` may depend on who watches."""


class _EventResponse(Response):
    """A 200 of server-sent events whose frames come as they come."""

    def __init__(self) -> None:
        # Not super().__init__(): it would announce the length of an empty body.
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)

    async def start(self, send: Send, first: bytes = b"") -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _write(send, RETRY + first)


class EventStream(_EventResponse):
    """What a turn's log holds after ``position``, live until the log is closed.

    ``on_end`` is called when nothing will be sent any more, whatever the reason.
    """

    def __init__(
        self,
        log: TurnLog,
        encoder: Encoder,
        *,
        position: int = 0,
        heartbeat_s: float = 15.0,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._log = log
        self._encoder = encoder
        self._frames = log.frames.setdefault(encoder.face, [])
        self._position = position
        self._heartbeat_s = heartbeat_s
        self._on_end = on_end
        self._push: Push | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._push = scope.get(PUSH_KEY)
        watch = self._log.watch(self._heartbeat_s, None if self._push is None else self._forward)
        try:
            async with client_watched(receive):
                await self.start(send, self._next())
                last = await self._follow(send, watch)
            await _write(send, last, more=False)
        except (ClientLeft, OSError):  # servers may tell a departure by OSError from send()
            pass
        finally:
            watch.end()
            if self._on_end is not None:
                self._on_end()

    async def _follow(self, send: Send, watch: Watch) -> bytes:
        """Write what comes until the log is closed; return what is left to be written."""
        log = self._log
        while True:
            if self._position < len(log.events):
                body = self._next()
                if log.is_closed and self._position == len(log.events):
                    return body
                await _write(send, body)
                if self._position < len(log.events):
                    # Where there is room, or nobody any more, send() does not suspend: others
                    # would wait until all was sent, and a departure would not be noticed.
                    await asyncio.sleep(0)
            elif log.is_closed:
                return b""
            elif not await watch.wait_change():
                await _write(send, HEARTBEAT)

    def _forward(self) -> bool:
        """Write the event that was logged just now, unless it has to wait or is the last."""
        if self._position >= len(self._log.events):
            return not self._log.is_closed  # one that the client claims to have seen
        if self._push is None or self._log.is_closed or not self._push(self._frame(self._position)):
            return False
        self._position += 1
        return True

    def _next(self) -> bytes:
        """Return the frames of the next write, and stand behind them."""
        frames = _take(map(self._frame, range(self._position, len(self._log.events))))
        self._position += len(frames)
        return b"".join(frames)

    def _frame(self, index: int) -> bytes:
        frames = self._frames
        if index < len(frames) and (frame := frames[index]) is not None:
            return frame
        event = self._log.events[index]
        frame = self._encoder.encode(self._log.turn_id, index + 1, event)
        if not isinstance(event, TurnFailed):  # that names the request it answers, so nobody shares it
            frames.extend([None] * (index + 1 - len(frames)))
            frames[index] = frame
        return frame


class StoredEvents(_EventResponse):
    """The events of a turn that is over, from the store."""

    def __init__(self, turn_id: str, events: Iterable[Numbered], encoder: Encoder) -> None:
        super().__init__()
        self._frames = [encoder.encode(turn_id, seq, event) for seq, event in events]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.start(send)
        frames = iter(self._frames)
        while taken := _take(frames):
            await _write(send, b"".join(taken))
            await asyncio.sleep(0)
        await _write(send, b"", more=False)


def _take(frames: Iterable[bytes]) -> list[bytes]:
    """Return the first of ``frames``, as many as make a write."""
    taken: list[bytes] = []
    size = 0
    for frame in frames:
        taken.append(frame)
        size += len(frame)
        if size >= WRITE_BYTES:
            break
    return taken


async def _write(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
