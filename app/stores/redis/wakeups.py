"""Who waits for a session is told when it is given back, by whichever process.

One connection of its own subscribes to what is waited for. It may be down: then nobody is told, and
who waits looks again by itself, as it does anyway after ``LOOK_S``.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from app.stores.redis.address import Connect
from app.stores.redis.wire import connect, end_tasks, pack, receive, send

AGAIN_S = 0.2
"""How long after a loss the connection is tried anew."""
LOOK_S = 2.0
"""How long somebody waits to be told before looking again: a connection may be dead without a word."""

_log = logging.getLogger(__name__)


class Call:
    """One who waits. ``ready``: whatever happens from now on is told; ``told``: something has."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.told = asyncio.Event()


class Wakeups:
    def __init__(self, connect: Connect, prefix: str) -> None:
        self._connect = connect
        self._channel = f"{prefix}:free:"
        self._calls: dict[str, set[Call]] = {}
        self._asked: set[str] = set()
        self._due: Counter[str] = Counter()  # confirmations
        self._subscribed: set[str] = set()
        self._changed = asyncio.Event()
        # A store may not know TaskOwner: this one is the object's, which ends it.
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._serve(), name="redis:wakeups")

    async def close(self) -> None:
        await end_tasks([self._task])

    @contextmanager
    def listening(self, tag: str) -> Iterator[Call]:
        """Be told, for as long as this lasts, when the session of this tag is given back."""
        call = Call()
        calls = self._calls.setdefault(tag, set())
        calls.add(call)
        self._changed.set()
        if tag in self._subscribed:
            call.ready.set()
        try:
            yield call
        finally:
            calls.discard(call)
            if not calls:
                del self._calls[tag]
                self._changed.set()

    async def _serve(self) -> None:
        while True:
            try:
                await self._attend()
            except* (RedisError, OSError) as errors:
                _log.debug("no connection for wake-ups: %s", errors.exceptions)
            except* Exception as errors:
                _log.error("wake-ups failed in a way that is not known", exc_info=errors)
            # What was given back meanwhile nobody has been told.
            for tag in list(self._calls):
                self._tell(tag)
            await asyncio.sleep(AGAIN_S)

    async def _attend(self) -> None:
        connection = self._connect()
        try:
            await connect(connection)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._subscribe(connection), name="redis:subscribe")
                group.create_task(self._listen(connection), name="redis:listen")
        finally:
            self._subscribed.clear()
            await connection.disconnect(nowait=True)

    async def _subscribe(self, connection: AbstractConnection) -> None:
        self._asked, self._due = set(), Counter()
        while True:
            self._changed.clear()
            # Once, and noted before anything is sent: who comes or goes meanwhile is the next time's.
            wanted, asked = set(self._calls), self._asked
            self._asked = wanted
            self._due.update(wanted - asked)
            self._subscribed -= asked - wanted
            for verb, tags in (("SUBSCRIBE", wanted - asked), ("UNSUBSCRIBE", asked - wanted)):
                if tags:
                    await send(connection, pack(verb, *(self._channel + tag for tag in tags)))
            await self._changed.wait()

    async def _listen(self, connection: AbstractConnection) -> None:
        while True:
            kind, channel, _ = await receive(connection, for_ever=True)
            tag = channel.decode().removeprefix(self._channel)
            if kind == b"message":
                self._tell(tag)
            elif kind == b"subscribe":
                self._confirm(tag)

    def _confirm(self, tag: str) -> None:
        self._due[tag] -= 1
        if self._due[tag]:
            return  # behind this one there is an UNSUBSCRIBE under way
        del self._due[tag]
        if tag not in self._asked:
            return
        self._subscribed.add(tag)
        for call in self._calls.get(tag, ()):
            call.ready.set()

    def _tell(self, tag: str) -> None:
        for call in self._calls.get(tag, ()):
            call.told.set()
