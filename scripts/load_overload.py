"""Overload: how many turns a server carries, and what becomes of it when five times as many come.

    python3 scripts/dev.py load-test overload --pid PID [--times 5] [--seconds 60] [--peak-seconds 10]

First the peak is measured, in a closed loop. Then turns come at a rate of their own, as strangers'
do (Poisson), whatever becomes of them; meanwhile health and admin routes are asked. At last it is
looked at how soon all is as before. A refusal is 503 ``OVERLOADED`` with ``Retry-After``; whatever
else is not an answer is an error, and every answer is checked as in the other scenarios.

The client is as light as can be, on connections that are open before: what it takes of the machine
the server has not.
"""

import argparse
import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import aiohttp
import load_process
import orjson
from load_client import TurnError, to_answer
from load_figures import Figures, Threshold, percentiles
from load_session import Answer, Session, SessionMaker, no_filler

CONNECTIONS = 1500
LOOK_S = 0.25
TICK_S = 0.001
CALM_CLIENTS = 16
CALM_S = 5.0
REFUSED = "OVERLOADED"
PROMISED = (
    Threshold("goodput", 0.9, is_upper=False),
    Threshold("refused_p99_ms", 100.0, is_upper=True),
    Threshold("recovery_s", 5.0, is_upper=True),
    Threshold("rss_grown_mib", 256.0, is_upper=True),
)
"""What is asked of the server where nothing else is given as a bound."""


class Line(asyncio.Protocol):
    """A connection that carries one request at a time; ``done`` gets status, head and body."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: Callable[[int, bytes, bytes], None] | None = None
        self._data = b""
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by descent

    def ask(self, request: bytes, done: Callable[[int, bytes, bytes], None]) -> None:
        assert self._transport is not None
        self._data, self._done = b"", done
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        head = head.lower()
        _, is_whole, length = head.partition(b"content-length:")
        ended = len(body) >= int(length.split(b"\r\n")[0]) if is_whole else body.endswith(b"0\r\n\r\n")
        if ended:
            self._end(int(head[9:12]), head, body)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._end(0, b"", b"")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _end(self, status: int, head: bytes, body: bytes) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(status, head, body)


@dataclass(slots=True)
class Stage:
    """What was measured in one part of the run; times in seconds. ``in_time``: turns that ended in it."""

    began: float = field(default_factory=time.perf_counter)
    duration_s: float = 0.0
    finished: list[float] = field(default_factory=list)
    in_time: int = 0
    refused: list[float] = field(default_factory=list)
    last_refusal_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        return self.in_time / self.duration_s if self.duration_s else 0.0


class Crowd:
    """Clients of one server. A session has one turn at a time, and a fresh one takes its place in the end."""

    def __init__(self, options: argparse.Namespace, maker: SessionMaker) -> None:
        url = urlsplit(options.url.split(",")[0])
        self._options = options
        self._address = (url.hostname or "127.0.0.1", url.port or 80)
        self._prefix = options.prefix.rstrip("/")
        given = "".join(f"{line.replace(':', ': ', 1)}\r\n" for line in options.header)
        self._head = f"Host: {url.netloc}\r\nContent-Type: application/json\r\n{given}".encode()
        self._maker = maker
        self._random = random.Random(options.seed)
        self._ready = maker.make(options.sessions)
        self._free: deque[Line] = deque()  # used by turns, so that none is idle for as long as servers wait
        self._lines: list[Line] = []
        self._under_way = 0

    @property
    def sessions(self) -> list[Session]:
        """Those that have no turn under way."""
        return self._ready

    async def connect(self, count: int) -> None:
        """Have so many connections open."""
        loop = asyncio.get_running_loop()
        self._lines = [line for line in self._lines if line.is_open]
        for _ in range(count - len(self._lines)):
            _, line = await loop.create_connection(Line, *self._address)
            self._lines.append(line)
            self._free.append(line)

    async def _stay_connected(self) -> None:
        while True:  # servers close what is idle
            await self.connect(CONNECTIONS)
            await asyncio.sleep(LOOK_S)

    def close(self) -> None:
        for line in self._lines:
            line.close()
        self._lines.clear()
        self._free.clear()

    async def run_closed(self, clients: int, seconds: float) -> Stage:
        """Keep ``clients`` turns running: each begins when one before it has ended."""
        self.close()  # on fresh connections: the server may be about to close the others
        stage = Stage()
        give_up_at = stage.began + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._work(stage, give_up_at), name=f"client {number}")
        stage.duration_s = time.perf_counter() - stage.began
        return stage

    async def run_open(self, rate: float, seconds: float) -> Stage:
        """Begin ``rate`` turns per second; return when the last has ended.

        Latencies count from when a turn is due.
        """
        await self.connect(CONNECTIONS)
        staying = asyncio.create_task(self._stay_connected(), name="connections")
        stage = Stage()
        due = stage.began
        while (now := time.perf_counter()) < stage.began + seconds:
            while due <= now and self._ready:
                if (line := self._take_line()) is None:
                    break
                self._begin(line, stage, due)
                due += self._random.expovariate(rate)
            await asyncio.sleep(TICK_S)
        stage.duration_s = time.perf_counter() - stage.began
        staying.cancel()
        while self._under_way:  # noqa: ASYNC110  # no event: a look at each answer would cost more
            await asyncio.sleep(TICK_S)
        return stage

    async def _work(self, stage: Stage, give_up_at: float) -> None:
        loop = asyncio.get_running_loop()
        while (now := time.perf_counter()) < give_up_at:
            if (line := self._take_line()) is None:
                _, line = await loop.create_connection(Line, *self._address)
                self._lines.append(line)
            ended = loop.create_future()
            self._begin(line, stage, now, lambda ended=ended: ended.set_result(None))  # type: ignore[misc]
            await ended

    def _take_line(self) -> Line | None:
        while self._free:
            line = self._free.popleft()
            if line.is_open:
                return line
        return None

    def _begin(self, line: Line, stage: Stage, due: float, then: Callable[[], None] = lambda: None) -> None:
        session = self._take_session()
        is_streamed = self._random.random() < self._options.stream_share
        body = orjson.dumps({"session_id": session.session_id, "message": session.next_message(no_filler)})
        path = f"{self._prefix}/chat{'/stream' if is_streamed else ''}".encode()
        self._under_way += 1

        def done(status: int, head: bytes, body: bytes) -> None:
            self._under_way -= 1
            self._free.append(line)
            self._note(stage, session, time.perf_counter() - due, status, head, body)
            then()

        line.ask(
            b"POST %b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b" % (path, self._head, len(body), body), done
        )

    def _take_session(self) -> Session:
        chosen = self._random.randrange(len(self._ready))
        self._ready[chosen], self._ready[-1] = self._ready[-1], self._ready[chosen]
        return self._ready.pop()

    def _note(
        self, stage: Stage, session: Session, took_s: float, status: int, head: bytes, body: bytes
    ) -> None:
        answer = find_answer(body) if status == 200 else None
        if answer is not None:
            if wrong := session.take(answer, self._options.expect_echo):
                stage.wrong.append(wrong)
            stage.finished.append(took_s)
            stage.in_time += not stage.duration_s
            self._ready.append(session if session.turns < self._options.turns else self._maker.make(1)[0])
        elif status == 503 and code_of(body) == REFUSED and b"\r\nretry-after:" in head:
            stage.refused.append(took_s)
            stage.last_refusal_s = time.perf_counter() - stage.began
            self._ready.append(session)
        else:
            stage.errors[code_of(body) or f"client: status {status}"] += 1
            self._ready.append(self._maker.make(1)[0])


def open_watch() -> aiohttp.ClientSession:
    """Return what ``Watch`` asks with: a new connection each time, as probes do."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))


class Watch:
    """Asks health and admin routes all the time, and looks at the server's memory."""

    def __init__(self, options: argparse.Namespace, http: aiohttp.ClientSession) -> None:
        self._base = options.url.split(",")[0].rstrip("/") + options.prefix.rstrip("/")
        self._pid = options.pid
        self._http = http
        self.answers: list[float] = []
        self.errors: Counter[str] = Counter()
        self.most_mib = 0.0

    async def look_for_ever(self) -> None:
        while True:
            for route in ("/health", "/agent-stats"):
                await self._ask(route)
            if self._pid:
                self.most_mib = max(self.most_mib, load_process.read_rss_mib(self._pid))
            await asyncio.sleep(LOOK_S)

    async def _ask(self, route: str) -> None:
        began = time.perf_counter()
        try:
            async with self._http.get(self._base + route) as response:
                await response.read()
                if response.status != 200:
                    self.errors[f"{route}: {response.status}"] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self.errors[f"{route}: {type(error).__name__}"] += 1
        self.answers.append(time.perf_counter() - began)


async def run(
    options: argparse.Namespace, maker: SessionMaker, http: aiohttp.ClientSession
) -> tuple[list[Stage], Figures, Counter[str]]:
    """Find the peak, overload the server, look how it recovers; return the stages, figures and errors."""
    crowd, watch = Crowd(options, maker), Watch(options, http)
    try:
        await crowd.run_closed(options.concurrency, options.warm_up)
        peak = await crowd.run_closed(options.concurrency, options.peak_seconds)
        before_mib = load_process.read_rss_mib(options.pid) if options.pid else 0.0
        watching = asyncio.create_task(watch.look_for_ever(), name="watch")
        try:
            over = await crowd.run_open(options.times * max(peak.per_s, 1.0), options.seconds)
            drained_s = time.perf_counter() - over.began - over.duration_s
        finally:
            watching.cancel()
        calm = await crowd.run_closed(CALM_CLIENTS, CALM_S)
    finally:
        crowd.close()
    figures = figures_of(peak, over, calm, drained_s) | percentiles("watch_", watch.answers)
    if options.pid:
        figures |= {"rss_before_mib": before_mib, "rss_grown_mib": watch.most_mib - before_mib}
    stages = [peak, over, calm]
    return stages, figures, sum((stage.errors for stage in stages), watch.errors)


def figures_of(peak: Stage, over: Stage, calm: Stage, drained_s: float) -> Figures:
    """Return what the stages say; turns of the overload count until its end only."""
    offered = len(over.finished) + len(over.refused) + over.errors.total()
    figures = {
        "peak_per_s": peak.per_s,
        "offered_per_s": offered / over.duration_s,
        "turns_per_s": over.per_s,
        "goodput": over.per_s / max(peak.per_s, 1e-9),
        "recovery_s": max(drained_s, calm.last_refusal_s),
    }
    return figures | percentiles("", over.finished) | percentiles("refused_", over.refused)


def find_answer(body: bytes) -> Answer | None:
    """Return the answer of either route, ``None`` if the turn did not finish."""
    try:
        if body.startswith(b"{"):
            return to_answer(orjson.loads(body))
        events = [line[5:] for line in body.split(b"\n") if line.startswith(b"data:")]
        last = orjson.loads(events[-1])
        return to_answer(orjson.loads(events[0]) | last) if last["type"] == "turn.finished" else None
    except (TurnError, ValueError, LookupError, TypeError):
        return None


def code_of(body: bytes) -> str:
    """Return the code of a problem document, or of a stream that failed; "" where there is none."""
    try:
        if body.startswith(b"{"):
            return str(orjson.loads(body)["code"])
        last = [line[5:] for line in body.split(b"\n") if line.startswith(b"data:")][-1]
        return str(orjson.loads(last).get("code", ""))
    except (ValueError, LookupError, TypeError):
        return ""
