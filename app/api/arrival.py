"""How a request arrives on a connection: within which time and in which size; and what is said otherwise.

uvicorn with httptools alone waits for ever for the rest of a request, takes a head of any size,
and says plain text where a request is not HTTP. Here every request gets a problem document and
only its own: what is wrong with one that comes behind others in a pipeline waits for their answers.

A request that arrives in one piece, as nearly all do, costs no timer. A connection has one at most.
"""

import asyncio
import logging
from typing import Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.api.body import DRAIN_S
from app.api.errors import HeadTooLarge, MalformedRequest, RequestTimeout, UriTooLong, problem_response
from app.api.exchange import SCOPE_KEY, Exchange
from app.api.safety import with_safety
from app.domain.errors import AgentPoolError

MAX_HEAD_BYTES: Final = 32 * 1024
"""Of all header fields together, as nginx has it (large_client_header_buffers 4 8k)."""
MAX_HEADERS: Final = 100
"""Header fields, as Apache has it (LimitRequestFields)."""
MAX_URL_BYTES: Final = 16 * 1024
"""Twice what nginx and Apache take; httptools itself fails at 64 KiB."""
BODY_STEP_BYTES: Final = 16 * 1024

_log = logging.getLogger(__name__)


class ArrivalProtocol(HttpToolsProtocol):
    """A connection on which requests have to arrive in time, and to fit.

    ``HEAD_S``: from the connection, or from its first byte, to a request's whole head; less than the
    10 s that are promised, since a busy loop comes late. A body has to bring ``BODY_STEP_BYTES``, or
    its end, in every ``BODY_STEP_S`` (as Apache's mod_reqtimeout, MinRate=500), and
    its end within ``BODY_STEPS`` of them. A connection on which nothing was asked is closed without a
    word, as by nginx: a browser that connects in advance would take it for its answer.
    """

    HEAD_S = 8.0
    BODY_STEP_S = 30.0
    BODY_STEPS = 10

    url = b""
    _rest: asyncio.TimerHandle | None = None  # ends the wait for the rest of a request, or lingering
    _is_whole = True  # nothing of a request has come that is not all there
    _in_body = False
    _fed = 0  # bytes of this request; with what came in one piece before it, _slack of them at most
    _slack = 0
    _piece = 0
    _steps = 0
    _has_body = False  # what was fed last brought some
    _barren = 0  # bytes that were fed since a body brought nothing more: its trailers, if many
    _is_upgrade = False  # the request asks for another protocol
    _refusal: AgentPoolError | None = None  # the last word on this connection; what comes after it is dropped

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_rest()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        if self._is_whole:
            self._is_whole = False
            self._fed = self._slack = 0
        self._piece = len(data)
        self._fed += self._piece
        self._unset_keepalive_if_required()
        self._has_body = False
        self._feed(data)
        if not self._is_whole and self._refusal is None:
            self._check_part()

    def _feed(self, data: bytes | memoryview) -> None:
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    self._stay_with_http()
                    data = memoryview(data)[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, AgentPoolError) else MalformedRequest())

    def _stay_with_http(self) -> None:
        """Tell a new parser of the same request, without the other protocol that it asks for.

        The old one takes what follows for that. (Java's HttpClient asks for h2c with every first POST.)
        """
        start = (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self._is_upgrade = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"%b %b HTTP/%b\r\n%b\r\n" % (*start, b"".join(fields)))

    # What the parser tells.

    def on_message_begin(self) -> None:
        self._is_whole = False
        self._forget_rest()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._forget_rest()
        if (excess := self._find_excess()) is not None:
            raise excess
        self._is_upgrade = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._is_upgrade:
            return
        super().on_headers_complete()  # raises where the address is none
        self.headers = []  # for trailers, which are dropped: they are no headers (RFC 9110, 6.5.1)
        self._in_body = True
        self._steps = self._barren = 0

    def on_body(self, body: bytes) -> None:
        self._has_body = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        super().on_message_complete()
        self._is_whole = True
        self._in_body = False
        self._fed = self._slack = self._piece
        self._forget_rest()

    # Waiting for the rest.

    def _check_part(self) -> None:
        """Something of a request is there, but not all of it."""
        self._barren = 0 if self._has_body else self._barren + self._piece
        if not self._in_body and self._fed - self._slack > MAX_HEAD_BYTES + MAX_URL_BYTES:
            self._refuse(UriTooLong() if len(self.url) > MAX_URL_BYTES else HeadTooLarge())
        elif self._in_body and self._barren > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge())
        elif self._rest is None:
            self._await_rest()

    def _find_excess(self) -> AgentPoolError | None:
        if len(self.url) > MAX_URL_BYTES:
            return UriTooLong()
        # Adding up costs more than all else here, so only where they could be too large.
        is_large = self._fed > MAX_HEAD_BYTES and _size_of(self.headers) > MAX_HEAD_BYTES
        return HeadTooLarge() if is_large or len(self.headers) > MAX_HEADERS else None

    def _await_rest(self) -> None:
        limit_s = self.BODY_STEP_S if self._in_body else self.HEAD_S
        self._rest = self.loop.call_later(limit_s, self._check_arrival, self._fed)

    def _forget_rest(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    def _check_arrival(self, fed_before: int) -> None:
        self._rest = None
        if self._is_kept_waiting():
            self._await_rest()
            return
        self._steps += 1
        if self._in_body and self._fed - fed_before >= BODY_STEP_BYTES and self._steps < self.BODY_STEPS:
            self._await_rest()
        else:
            self._refuse(RequestTimeout())

    def _is_kept_waiting(self) -> bool:
        """Whether the request is behind others, of which the answers are on their way."""
        if self.pipeline or self.flow.read_paused:
            return True
        return not self._in_body and self.cycle is not None and not self.cycle.response_complete

    # Saying no.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._refusal is not None and self.cycle.response_complete:
            self._say_no(self._refusal)

    def _refuse(self, error: AgentPoolError) -> None:
        """Answer the request that arrives, when it is its turn, and end the connection."""
        self._refusal = error
        self._forget_rest()
        _log.debug("refused a request: %s", error.code)  # not louder: anybody may fill a log with these
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._say_no(error)
        elif self._in_body:
            cycle.disconnected = True  # whoever waits for the body will not get it
            cycle.message_event.set()
            self._say_no(error)

    def _say_no(self, error: AgentPoolError) -> None:
        is_answered = self._in_body and self.cycle.response_started
        if self.transport.is_closing():
            return
        if self._fed == 0 or self.pipeline or is_answered:
            self.transport.close()
            return
        self.transport.write(self._answer(error))
        # With the end of writing, not with a close: that would reset the connection while the client
        # still sends, which might never read the answer then.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._rest = self.loop.call_later(DRAIN_S, self.transport.close)

    def _answer(self, error: AgentPoolError) -> bytes:
        exchange = (self.scope or {}).get(SCOPE_KEY) if self._in_body else None
        if not isinstance(exchange, Exchange):
            exchange = Exchange()
        response = problem_response(error, exchange, {"Connection": "close"})
        headers = with_safety([*response.raw_headers, *exchange.response_headers()])
        lines = [b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *headers)]
        return b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", bytes(response.body)])


def _size_of(headers: list[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) + len(": \r\n") for name, value in headers)
