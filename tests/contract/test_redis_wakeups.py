"""What becomes of wake-ups, and of the connection for all, when theirs ends at whatever moment."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import ExitStack
from uuid import uuid4

import pytest
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as ConnectionLost

from app.domain.errors import StoreUnavailable
from app.domain.ids import SessionKey
from app.stores.redis.address import Address
from app.stores.redis.store import RedisStore
from app.stores.redis.wakeups import Wakeups
from app.stores.redis.wire import connect, pack, receive, send
from tests.redisserver import RedisServer

from .builders import BOOT, LIFE
from .faulty_wire import FaultyWire

SOON_S = 5.0


class Ears:
    """Wake-ups of a server, and the connection they have now; the first attempts end with ``failures``."""

    def __init__(self, server: RedisServer, *failures: Exception) -> None:
        self._failures = list(failures)
        self._address = Address(server.url)
        self.connection: AbstractConnection | None = None
        self.channel = f"ears-{uuid4().hex}"
        self.wakeups = Wakeups(self._connect, self.channel)

    def _connect(self) -> AbstractConnection:
        if self._failures:
            raise self._failures.pop()
        self.connection = self._address.connect()
        return self.connection

    async def until_up(self) -> AbstractConnection:
        """Return the connection once it is up."""
        async with asyncio.timeout(SOON_S):
            while self.connection is None or not self.connection.is_connected:  # noqa: ASYNC110
                await asyncio.sleep(0)
        return self.connection

    async def close(self) -> None:
        async with asyncio.timeout(SOON_S):
            await self.wakeups.close()
        await self._address.close()


@pytest.fixture
async def ears(redis_server: RedisServer) -> AsyncIterator[Ears]:
    ears = Ears(redis_server)
    yield ears
    await ears.close()


@pytest.fixture
async def complaints() -> AsyncIterator[None]:
    """Whatever the event loop has to complain of our tasks fails the test."""
    found: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(repr(context)))
    yield
    gc.collect()
    assert [one for one in found if "redis:" in one] == []


def redis_tasks() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("redis:")}


@pytest.mark.usefixtures("complaints")
@pytest.mark.parametrize("steps", range(8))
async def test_wake_ups_outlive_a_connection_that_ends_while_they_subscribe(
    ears: Ears, redis_server: RedisServer, steps: int
) -> None:
    """However far the subscription has got, who waits then is told on the next connection."""
    lost = await ears.until_up()
    with ears.wakeups.listening("one"):
        for _ in range(steps):
            await asyncio.sleep(0)
        await lost.disconnect(nowait=True)
        with ears.wakeups.listening("two") as call:
            async with asyncio.timeout(SOON_S):
                while "two" not in ears.wakeups._subscribed:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            assert ears.connection is not lost
            call.told.clear()
            redis_server.command("PUBLISH", f"{ears.channel}:free:two", "")
            async with asyncio.timeout(SOON_S):
                await call.told.wait()


@pytest.mark.parametrize("steps", range(8))
async def test_wake_ups_end_when_they_are_told_to_while_they_subscribe(ears: Ears, steps: int) -> None:
    """However far the subscription has got, a close leaves no task behind."""
    await ears.until_up()
    with ears.wakeups.listening("one"):
        for _ in range(steps):
            await asyncio.sleep(0)
        await ears.close()
    assert redis_tasks() == set()


@pytest.mark.parametrize("pause", range(4))
async def test_who_comes_while_another_is_subscribed_is_subscribed_too(ears: Ears, pause: int) -> None:
    """Of forty who come at any step of each other's subscription, each is ready, and none is left behind."""
    await ears.until_up()
    with ExitStack() as all_calls:
        calls = []
        for number in range(40):
            calls.append(all_calls.enter_context(ears.wakeups.listening(f"s{number}")))
            for _ in range(pause):
                await asyncio.sleep(0)
        async with asyncio.timeout(SOON_S):
            await asyncio.gather(*(call.ready.wait() for call in calls))


@pytest.mark.parametrize("pause", range(1, 6))
async def test_who_is_ready_is_told_though_others_have_just_gone(
    ears: Ears, redis_server: RedisServer, pause: int
) -> None:
    """A subscription that is being ended for one is not taken for that of the next."""
    await ears.until_up()
    for _ in range(20):
        with ears.wakeups.listening("s"):
            for _ in range(pause):
                await asyncio.sleep(0)
        for _ in range(pause):
            await asyncio.sleep(0)
        with ears.wakeups.listening("s") as call:
            async with asyncio.timeout(SOON_S):
                await call.ready.wait()
                redis_server.command("PUBLISH", f"{ears.channel}:free:s", "")
                await call.told.wait()


async def test_wake_ups_survive_what_nobody_has_thought_of(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of any kind is logged and the connection made anew."""
    ears = Ears(redis_server, LookupError("never seen"))
    with ears.wakeups.listening("one") as call:
        async with asyncio.timeout(SOON_S):
            await call.ready.wait()
    assert "never seen" in caplog.text
    await ears.close()


async def test_a_connection_that_ends_while_it_is_written_to_is_lost(redis_server: RedisServer) -> None:
    """Whatever redis-py makes of it, and it is not connected anew behind the back of who reads."""
    connection = Address(redis_server.url).connect()
    await connect(connection)
    await send(connection, pack("PING"))
    assert await receive(connection) == b"PONG"
    call = asyncio.get_running_loop().create_task(send(connection, pack("PING")))
    await asyncio.sleep(0)
    await connection.disconnect(nowait=True)
    with pytest.raises(ConnectionLost):
        await call
    for again in (send(connection, pack("PING")), receive(connection)):
        with pytest.raises(ConnectionLost):
            await again
    assert not connection.is_connected


@pytest.mark.usefixtures("complaints")
async def test_lines_that_are_lost_leave_nothing_behind(redis_server: RedisServer) -> None:
    """After a hundred cuts amid calls no task of a lost line is left, and none has failed unheard."""
    async with FaultyWire(redis_server.port).running() as wire:
        store = RedisStore(wire.url, LIFE, prefix=f"lines-{uuid4().hex}")
        await store.open(BOOT)
        loop = asyncio.get_running_loop()
        for round_ in range(100):
            calls = [loop.create_task(store.find_session(SessionKey("", f"s{n}"))) for n in range(20)]
            for _ in range(round_ % 10):
                await asyncio.sleep(0)
            wire.cut()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(one is None or isinstance(one, StoreUnavailable) for one in results)
        await store.close()
        async with asyncio.timeout(SOON_S):
            while redis_tasks():  # noqa: ASYNC110
                await asyncio.sleep(0)
