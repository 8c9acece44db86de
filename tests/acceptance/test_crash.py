"""``kill -9`` under load: what was answered is there once and in order, what was refused is not.

Twenty clients talk to a server that is killed at random instants and started again, on one
store. Some talk to the demo model, some to a slow one, so that turns are in the air at
every kill; some of these are watched as streams. Half of the messages carry a key, and of
those the ones that a kill left in doubt are sent again.
"""

import asyncio
import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import aiohttp
import apsw
import pytest

from tests.acceptance.history import Log, Message, Op, check, messages_of, text_of
from tests.modelserver import ModelServer
from tests.serverprocess import START_S, ServerProcess

CLIENTS = 20
SLOW_CLIENTS = 6
KILL_AFTER_S = 0.6
LIVES_OF_A_SESSION = 4
READY_S = 2.0
PATIENCE = aiohttp.ClientTimeout(total=30)

_log = logging.getLogger(__name__)


@dataclass
class Client:
    """Sends one message after another to one session, until the server is gone."""

    number: int
    log: Log
    chance: Random
    session: str = ""
    sent: int = 0
    doubts: list[Op] = field(default_factory=list)

    @property
    def is_slow(self) -> bool:
        return self.number < SLOW_CLIENTS

    async def talk(self, http: aiohttp.ClientSession, *, only_doubts: bool = False) -> None:
        """Send again what is in doubt, then new messages, until the server does not answer."""
        while self.doubts or not only_doubts:
            op = self.doubts[0] if self.doubts else self._next()
            op = await self._send(http, replace(op, t0=time.monotonic()))
            if op.t1:
                self.log.write(op)
            if op.outcome == "unknown":
                if op.key is not None and not self.doubts:
                    self.doubts.append(op)
                return
            if self.doubts:
                self.doubts.pop(0)

    def _next(self) -> Op:
        self.sent += 1
        # Up to half a second: one that dies within the first tenth leaves no trace.
        directive = {"mode": "text", "chunks": 3, "delay_s": round(self.chance.uniform(0, 0.15), 3)}
        text = text_of(self.session, self.sent)
        if self.is_slow:
            text = text_of(self.session, self.sent, f"[[{json.dumps(directive | {'text': f're {text}'})}]]")
        key = f"{self.session}-{self.sent}" if self.chance.random() < 0.5 else None
        return Op(t0=0, t1=0, session=self.session, text=text, outcome="unknown", key=key)

    async def _send(self, http: aiohttp.ClientSession, op: Op) -> Op:
        """Send the message and return what became of it; ``t1`` stays 0 if it was not even sent."""
        body = {
            "session_id": op.session,
            "message": op.text,
            "provider": "openai" if self.is_slow else "demo",
        }
        headers = {} if op.key is None else {"Idempotency-Key": op.key}
        path = "/chat/stream" if self.is_slow and self.chance.random() < 0.5 else "/chat"
        op = replace(op, outcome="unknown", turn_id=None, t1=0)
        try:
            async with http.post(path, json=body, headers=headers) as response:
                op = replace(op, turn_id=response.headers.get("X-Turn-ID"))
                raw = await response.read()
        except aiohttp.ClientConnectorError:
            return op
        except (aiohttp.ClientError, OSError):
            return replace(op, t1=time.monotonic())
        op = replace(op, t1=time.monotonic())
        end = json.loads(raw if path == "/chat" else raw.rpartition(b"data: ")[2])
        if "reply" in end:
            return replace(op, outcome="ok", reply=end["reply"])
        return op if end.get("outcome") == "unknown" else replace(op, outcome="fail")


class World:
    """The server, its clients, and what was seen of them over all lives."""

    def __init__(self, server: ServerProcess, folder: Path) -> None:
        self.server = server
        self.log = Log(folder / "ops.jsonl")
        self.chance = Random(9)
        self.clients = [Client(number, self.log, Random(number)) for number in range(CLIENTS)]
        self.lives = 0
        self.ready_s: list[float] = []
        self.ready_cpu_s: list[float] = []
        self.ends: dict[str, str] = {}  # of turns that were in the air at a kill, by id

    def live(self) -> None:
        """Let the clients talk, kill the server at a random instant, start it, look at the turns."""
        for client in self.clients:
            if self.lives % LIVES_OF_A_SESSION == 0 and not client.doubts:
                client.session, client.sent = f"s{self.lives}-{client.number}", 0
        self.lives += 1
        asyncio.run(self._talk(kill_after_s=self.chance.uniform(0, KILL_AFTER_S)))
        self.server.wait()
        began = time.monotonic()
        self.server.start()
        asyncio.run(self._get_ready())
        self.ready_s.append(time.monotonic() - began)
        self.ready_cpu_s.append(_cpu_s(self.server.pid))
        asyncio.run(self._look_at_turns())

    def settle(self) -> None:
        """Send again what is in doubt, and let the server answer."""
        asyncio.run(self._talk(kill_after_s=None))
        assert [client.doubts for client in self.clients if client.doubts] == []

    async def _talk(self, kill_after_s: float | None) -> None:
        async with self._http() as http:
            if kill_after_s is not None:
                loop = asyncio.get_running_loop()
                loop.call_later(kill_after_s, os.kill, self.server.pid, signal.SIGKILL)
            talks = (client.talk(http, only_doubts=kill_after_s is None) for client in self.clients)
            await asyncio.gather(*talks)

    async def _get_ready(self) -> None:
        async with self._http() as http, asyncio.timeout(START_S):
            status = 0
            while status != 200:
                async with http.get("/ready") as response:
                    status = response.status

    async def _look_at_turns(self) -> None:
        """No turn of the last life runs any more; those that ran and were not stored are interrupted."""
        async with self._http() as http:
            paths = (f"/sessions/{client.session}/turns?limit=200" for client in self.clients)
            for page in await asyncio.gather(*(_get(http, path) for path in paths)):
                turns = page.get("turns", [])
                assert [turn for turn in turns if turn["status"] not in ("finished", "failed")] == []
                assert {turn["error"]["code"] for turn in turns if turn["error"]} <= {"INTERRUPTED"}
                self.ends |= {turn["turn_id"]: turn["status"] for turn in turns}

    async def histories(self) -> dict[str, list[Message]]:
        """Return what the server shows of every session that was spoken to."""
        async with self._http() as http:
            sessions = {op.session for op in self.log.read()}
            return {session: messages_of(await _history(http, session)) for session in sessions}

    def _http(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(self.server.url, connector=connector, timeout=PATIENCE)


async def _history(http: aiohttp.ClientSession, session: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    before = ""
    while before is not None:
        page = await _get(http, f"/sessions/{session}/history?limit=200{before and f'&before={before}'}")
        messages = page.get("messages", []) + messages
        before = page.get("next_before")
    return messages


async def _get(http: aiohttp.ClientSession, path: str) -> dict[str, Any]:
    async with http.get(path) as response:
        assert response.status in (200, 404)
        return dict(await response.json(content_type=None))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ModelServer() as model:
        settings = {
            "MODEL_PROVIDER": "demo",
            "OPENAI_API_KEY": "k",
            "OPENAI_BASE_URL": model.base_url,
            "OPENAI_MODEL": "m",
            "LOG_LEVEL": "warning",
            # Compiled modules are kept, as an installation keeps them: half of a start is compiling.
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled"),
        }
        with ServerProcess(tmp_path, **settings) as server:
            yield World(server, tmp_path)


@pytest.mark.timeout(3600)
def test_kill_at_any_instant_loses_doubles_and_mixes_nothing(
    world: World, kills: int, tmp_path: Path
) -> None:
    """After each kill the server is ready in two seconds and no turn runs; nothing answered is lost."""
    for _ in range(kills):
        world.live()
    world.settle()
    ops = world.log.read()
    faults = check(ops, asyncio.run(world.histories()))
    world.server.stop()
    outcomes = Counter(op.outcome for op in ops)
    ends = Counter(world.ends.values())
    _log.info("%d kills, %s, turns %s", kills, dict(outcomes), dict(ends))
    _log.info("ready after %s", _spread(world.ready_s))
    _log.info("ready after seconds of its own time: %s", _spread(world.ready_cpu_s))
    assert faults == []
    assert "Traceback" not in world.server.log()
    # Its own time: beside other tests the machine's says little.
    assert median(world.ready_cpu_s) < READY_S
    # That it was a load, and that turns were in the air.
    assert outcomes["ok"] > 5 * kills
    assert outcomes["unknown"] > kills
    assert ends["failed"] > 0
    connection = apsw.Connection(str(tmp_path / "pool.db"))
    assert connection.pragma("integrity_check") == "ok"
    connection.close()


def _cpu_s(pid: int) -> float:
    """Return the processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _spread(seconds: list[float]) -> str:
    return f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
