"""How a write waits for the disk: what is asked of the server, and what becomes of those who wait."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.domain.errors import StoreUnavailable
from app.stores.redis.ground import Fence
from app.stores.redis.wire import Wire

WAIT_MS = 200
SOON_S = 1.0


class Disk(Wire):
    """A connection to a server whose disk answers when, and as, the test says."""

    def __init__(self) -> None:
        super().__init__(lambda: pytest.fail("no connection is needed"), "p")
        self.asked: list[str] = []
        self.answers: asyncio.Queue[int | StoreUnavailable] = asyncio.Queue()

    async def call(self, *words: Any, repeats: bool = True, writes: bool = False) -> Any:
        self.asked.append(str(words[0]))
        if words[0] != "WAITAOF":
            return b"OK"
        answer = await self.answers.get()
        if isinstance(answer, StoreUnavailable):
            raise answer
        return [answer, 0]


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
async def fence(disk: Disk) -> AsyncIterator[Fence]:
    fence = Fence(disk, "p", WAIT_MS)
    yield fence
    await fence.close()


async def start(fence: Fence, disk: Disk, most: int) -> list[asyncio.Task[None]]:
    """Let so many wait, the first of them alone, and return when the server has been asked for it."""
    loop = asyncio.get_running_loop()
    waiters = [loop.create_task(fence.wait())]
    async with asyncio.timeout(SOON_S):
        while "WAITAOF" not in disk.asked:  # noqa: ASYNC110
            await asyncio.sleep(0)
    waiters += [loop.create_task(fence.wait()) for _ in range(most - 1)]
    await asyncio.sleep(0)
    return waiters


async def test_all_who_wait_are_told_at_once_that_the_disk_does_not_follow(fence: Fence, disk: Disk) -> None:
    """However many wait for a disk that says nothing, each is refused after the one time it was promised."""
    waiters = await start(fence, disk, 20)
    began = time.monotonic()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert time.monotonic() - began < SOON_S
    assert all(isinstance(one, StoreUnavailable) and one.outcome_unknown for one in results)


async def test_those_who_come_during_a_round_share_the_next(fence: Fence, disk: Disk) -> None:
    """Twenty writes are two rounds, and the answer to the first is not taken for those behind its mark."""
    waiters = await start(fence, disk, 20)
    disk.answers.put_nowait(1)
    await waiters[0]
    assert not any(waiter.done() for waiter in waiters[1:])
    disk.answers.put_nowait(1)
    await asyncio.gather(*waiters)
    assert disk.asked == ["SET", "WAITAOF"] * 2


@pytest.mark.parametrize("answer", [0, StoreUnavailable("The connection to Redis is lost.")])
async def test_who_shares_a_round_shares_its_failure(
    fence: Fence, disk: Disk, answer: int | StoreUnavailable
) -> None:
    """All of a failed round are refused with it, none asks for itself, and the next round is asked anew."""
    waiters = await start(fence, disk, 20)
    disk.answers.put_nowait(1)
    disk.answers.put_nowait(answer)
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert results[0] is None
    assert all(isinstance(one, StoreUnavailable) and one.outcome_unknown for one in results[1:])
    assert disk.asked == ["SET", "WAITAOF"] * 2
    disk.answers.put_nowait(1)
    await fence.wait()
    assert disk.asked == ["SET", "WAITAOF"] * 3


async def test_one_who_goes_takes_nobody_s_round_away(fence: Fence, disk: Disk) -> None:
    """Cancelled, even the one for whom a round began leaves it to the others."""
    waiters = await start(fence, disk, 3)
    waiters[0].cancel()
    waiters[1].cancel()
    disk.answers.put_nowait(1)
    disk.answers.put_nowait(1)
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(one) for one in results] == [asyncio.CancelledError, asyncio.CancelledError, type(None)]


async def test_who_waits_is_refused_when_the_fence_is_closed(fence: Fence, disk: Disk) -> None:
    """A close ends the rounds at once, and leaves nobody waiting."""
    waiters = await start(fence, disk, 3)
    await fence.close()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert all(isinstance(one, StoreUnavailable) for one in results)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "redis:fence"]
