"""Clients of a cluster in trouble: each request goes to any node, and what became of it is written down."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import aiohttp

from tests.acceptance.history import Log, Op, text_of
from tests.cluster import says

PATIENCE_S = 8.0
PAUSE_S = 0.05
# What says nothing of whether the turn was, will be, or is.
IN_DOUBT = frozenset({"NODE_UNREACHABLE"})
# What tells the client to come again, and that nothing was done.
COME_AGAIN = frozenset({"STORE_UNAVAILABLE", "DRAINING", "POOL_EXHAUSTED", "TURN_QUEUE_FULL"})


@dataclass
class Talker:
    """Sends one message after another to its session, to a node that ``find_urls`` names, at random.

    Another talker may have the same session. A message with a key that is in doubt is sent
    again until it is settled.
    """

    number: int
    session: str
    find_urls: Callable[[], Sequence[str]]
    log: Log
    key_share: float = 0.7
    chance: Random = field(init=False)
    sent: int = 0
    doubt: Op | None = None
    codes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.chance = Random(self.number)

    async def talk(self, http: aiohttp.ClientSession, until_s: float) -> None:
        """Talk until ``until_s`` by ``time.monotonic``."""
        while time.monotonic() < until_s:
            await self._say(http, self.doubt or self._next())

    async def settle(self, http: aiohttp.ClientSession, until_s: float) -> None:
        """Send again what is in doubt, until it is settled."""
        while self.doubt is not None and time.monotonic() < until_s:
            await self._say(http, self.doubt)

    def _next(self) -> Op:
        self.sent += 1
        number = self.sent * 1000 + self.number
        said = f"re {text_of(self.session, number)}"
        directive = says(said, chunks=3, delay_s=round(self.chance.uniform(0, 0.12), 3))
        text = text_of(self.session, number, directive)
        key = f"{self.session}-{number}" if self.chance.random() < self.key_share else None
        return Op(t0=0, t1=0, session=self.session, text=text, outcome="unknown", key=key)

    async def _say(self, http: aiohttp.ClientSession, op: Op) -> None:
        self.doubt = None
        op = await self._send(http, replace(op, t0=time.monotonic(), t1=0, outcome="unknown", turn_id=None))
        if op.t1:
            self.log.write(op)
        if op.outcome == "unknown" and op.key is not None:
            self.doubt = op
        if op.outcome != "ok":
            await _pause()

    async def _send(self, http: aiohttp.ClientSession, op: Op) -> Op:
        """Send the message and return what became of it; ``t1`` stays 0 if it was not even sent."""
        headers = {} if op.key is None else {"Idempotency-Key": op.key}
        path = "/chat/stream" if self.chance.random() < 0.5 else "/chat"
        url = self.chance.choice(list(self.find_urls())) + path
        body = {"session_id": op.session, "message": op.text}
        try:
            async with http.post(url, json=body, headers=headers) as response:
                op = replace(op, turn_id=response.headers.get("X-Turn-ID"))
                raw = await response.read()
        except aiohttp.ClientConnectorError:
            self.codes["refused"] += 1
            return op
        except (aiohttp.ClientError, OSError, TimeoutError):
            self.codes["cut off"] += 1
            return replace(op, t1=time.monotonic())
        return self._judge(replace(op, t1=time.monotonic()), raw)

    def _judge(self, op: Op, raw: bytes) -> Op:
        end = last_of(raw)
        code = str(end.get("code") or end.get("type") or "reply")
        self.codes[code] += 1
        if "reply" in end:
            return replace(op, outcome="ok", reply=end["reply"], turn_id=end.get("turn_id", op.turn_id))
        in_doubt = end.get("outcome") == "unknown" or code in IN_DOUBT or not code.isupper()
        return replace(op, code=code, outcome="unknown" if in_doubt else "fail")


def last_of(raw: bytes) -> dict[str, Any]:
    """Return an answer's object, or the last event of a stream, ``{}`` if it was cut off before one."""
    try:
        return dict(json.loads(raw if raw.startswith(b"{") else raw.rpartition(b"data: ")[2]))
    except ValueError:
        return {}


def open_http() -> aiohttp.ClientSession:
    """Return a client that sends nothing twice by itself."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE_S))


async def _pause() -> None:
    """Let others come first: who was refused does not ask again in the same breath."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    loop.call_later(PAUSE_S, over.set_result, None)
    await over
