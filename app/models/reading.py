"""One exchange with a provider, read where it arrives: in the connection's own callbacks."""

import asyncio
from collections.abc import Callable
from typing import Final

from app.domain.errors import ModelError
from app.models.answer import StreamedAnswer
from app.models.call import ModelCall
from app.models.sse import EventSplitter

Hear = Callable[[str], None]
"""Is called with each piece of text as it comes; must neither wait nor raise."""

_ERROR_BODY: Final = 64 * 1024
_GOODBYE_S: Final = 0.05


class Reading:
    """Implements ``app.models.http.Exchange`` for a streamed answer, or a refusal.

    The text of each read of the socket is heard as one piece. ``end`` is done when there is
    nothing more to come; then ``failure`` is what is wrong with what came. Once ``end``
    is done, also because the call was cancelled or its time is up, nothing more is heard.
    """

    def __init__(self, call: ModelCall, hear: Hear, max_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._hear = hear
        self._goodbye: asyncio.TimerHandle | None = None
        self._splitter = EventSplitter(max_bytes)
        self.answer = StreamedAnswer(call)
        self.end: asyncio.Future[None] = self._loop.create_future()
        self.failure: ModelError | None = None
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.refusal = b""  # the beginning of a body that is no answer

    def take_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status
        self.headers = headers

    def take_body(self, part: bytes) -> None:
        if self.end.done() or self.answer.is_complete:
            return
        if self.status != 200:
            self.refusal += part
            if len(self.refusal) >= _ERROR_BODY:
                self.end.set_result(None)
            return
        try:
            self.answer.take(self._splitter.feed(part))
        except ModelError as error:
            self.failure = error
        for piece in self.answer.pieces():
            self._hear(piece)
        if self.failure is not None:
            self.end.set_result(None)
        elif self.answer.is_complete:
            # The end of the body, which keeps the connection, comes with ``[DONE]`` or not at all.
            self._goodbye = self._loop.call_later(_GOODBYE_S, self.take_end, None)

    def take_end(self, error: Exception | None) -> None:
        if self._goodbye is not None:
            self._goodbye.cancel()
        if self.end.done():
            return
        if error is None or self.answer.is_complete:
            self.end.set_result(None)
        else:
            self.end.set_exception(error)
