"""Server-sent events over a turn's log; plain ASGI.

A watcher is a position in the log. Frames are encoded once per event and face and kept
beside the events, so that any number of watchers share them; a watcher that is behind
gets many whole events in one write, and holds nothing of its own.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.departure import ClientLeft, client_watched
from app.domain.events import TurnEvent, TurnFailed
from app.services.turn_log import TurnLog

MEDIA_TYPE = "text/event-stream"
RETRY = b"retry: 2000\n\n"
HEARTBEAT = b": still here\n\n"
WRITE_BYTES = 64 * 1024
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

    async def start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _write(send, RETRY)


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
        self._position = position
        self._heartbeat_s = heartbeat_s
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with client_watched(receive):
                await self.start(send)
                await self._follow(send)
            await _write(send, b"", more=False)
        except (ClientLeft, OSError):  # servers may tell a departure by OSError from send()
            pass
        finally:
            if self._on_end is not None:
                self._on_end()

    async def _follow(self, send: Send) -> None:
        log, position = self._log, self._position
        while True:
            if position < len(log.events):
                frames = _frames_from(log, self._encoder, position)
                position = len(log.events)
                for piece in _pieces(frames):
                    await _write(send, piece)
            elif log.is_closed:
                return
            else:
                try:
                    async with asyncio.timeout(self._heartbeat_s):
                        await log.wait_beyond(position)
                except TimeoutError:
                    await _write(send, HEARTBEAT)


class StoredEvents(_EventResponse):
    """The events of a turn that is over, from the store."""

    def __init__(self, turn_id: str, events: Iterable[Numbered], encoder: Encoder) -> None:
        super().__init__()
        self._frames = [encoder.encode(turn_id, seq, event) for seq, event in events]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.start(send)
        for piece in _pieces(self._frames):
            await _write(send, piece)
        await _write(send, b"", more=False)


def _frames_from(log: TurnLog, encoder: Encoder, position: int) -> list[bytes]:
    """Return the frames after ``position``; encodes what no watcher of this face has needed yet."""
    frames = log.frames.setdefault(encoder.face, [])
    for index in range(len(frames), len(log.events)):
        event = log.events[index]
        frame = encoder.encode(log.turn_id, index + 1, event)
        if isinstance(event, TurnFailed):  # names the request it answers, so nobody shares it
            return [*frames[position:], frame]
        frames.append(frame)
    return frames[position:]


def _pieces(frames: Sequence[bytes]) -> Iterator[bytes]:
    """Join whole frames into writes of about ``WRITE_BYTES``."""
    piece: list[bytes] = []
    size = 0
    for frame in frames:
        piece.append(frame)
        size += len(frame)
        if size >= WRITE_BYTES:
            yield b"".join(piece)
            piece, size = [], 0
    if piece:
        yield b"".join(piece)


async def _write(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
