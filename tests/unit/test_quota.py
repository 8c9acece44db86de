"""What a user may have: turns at a time, tokens per day, and requests whose counter may be away."""

import asyncio
import logging
import random
from dataclasses import replace

import pytest

from app.domain.errors import RateLimited, StoreUnavailable
from app.domain.quota import Quota
from app.domain.stats import DayUsage, UserUsage
from app.ports import Count
from app.services.quota import COMPLAIN_S, DAY_S, KNOWN_S, PAUSE_S, RequestQuota, TurnQuota
from app.stores.counting import MemoryCounter, open_counter
from tests.fakes import FakeClock

ALICE, BOB = ("", "alice"), ("", "bob")


class Books:
    """The store's sums; ``asked`` counts how often they were read. ``gate`` holds readers back.

    Readers are held back by what ``hold`` returns instead, one by each, in the order in which they come.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.tokens = 0
        self.asked = 0
        self.is_asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.holds: list[asyncio.Event] = []

    def hold(self) -> asyncio.Event:
        self.holds.append(asyncio.Event())
        return self.holds[-1]

    async def wait_asked(self, count: int) -> None:
        while self.asked < count:
            self.is_asked.clear()
            await self.is_asked.wait()

    async def read(self, owner: str, user_id: str, limit: int) -> UserUsage:
        self.asked += 1
        self.is_asked.set()
        today = self.clock.now_ms() // (1000 * DAY_S)
        days = (DayUsage(today, 1, self.tokens, 0), DayUsage(today - 1, 9, 10**6, 0))
        await (self.holds.pop(0) if self.holds else self.gate).wait()
        return UserUsage(1, self.tokens, 0, days[:limit])


def turn_quota(**limits: int) -> tuple[TurnQuota, Books]:
    clock = FakeClock()
    books = Books(clock)
    return TurnQuota(clock, books.read, **limits), books


def test_so_many_turns_at_a_time() -> None:
    """Exactly so many, for each user alone; one that ends makes room; nobody's turns are not counted."""
    quota, _ = turn_quota(concurrent=2)
    assert quota.admit(ALICE, 0) == (Quota(2, 1, 1, None, "turns"),)
    assert quota.admit(ALICE, 0) == (Quota(2, 0, 1, None, "turns"),)
    with pytest.raises(RateLimited) as refusal:
        quota.admit(ALICE, 0)
    assert refusal.value.quota == Quota(2, 0, 1, None, "turns")
    quota.admit(BOB, 0)
    assert [quota.admit(None, 0) for _ in range(5)] == [()] * 5
    quota.release(ALICE)
    quota.admit(ALICE, 0)
    with pytest.raises(RateLimited):
        quota.check(ALICE, 0)


async def test_tokens_of_the_day_are_the_stores_and_what_ended_since() -> None:
    """Below the limit a turn begins, at the limit none does, and it says when the day is over."""
    quota, books = turn_quota(tokens_per_day=100)
    books.tokens = 60
    quota.admit(ALICE, await quota.learn(ALICE))
    quota.release(ALICE, 39)
    assert quota.admit(ALICE, await quota.learn(ALICE))[0].remaining == 1
    quota.release(ALICE, 500)
    with pytest.raises(RateLimited) as refusal:
        quota.admit(ALICE, await quota.learn(ALICE))
    assert books.asked == 1
    assert refusal.value.quota.remaining == 0
    assert refusal.value.retry_after_s == DAY_S - books.clock.now_ms() / 1000 % DAY_S


async def test_an_erasure_does_not_begin_the_day_anew() -> None:
    """What a user had before the store forgot them counts until the day is over, also after a second time."""
    quota, books = turn_quota(tokens_per_day=100)
    books.tokens = 60
    for had in (60, 90):
        spent = await quota.measure(ALICE)
        assert spent is not None
        assert spent.tokens == had
        quota.note_erasure(ALICE, spent)
        assert await quota.learn(ALICE) == had
        books.tokens = 0
        quota.note_erasure(ALICE, replace(spent, stored=0))
        assert await quota.learn(ALICE) == had
        quota.release(ALICE, 30)
        books.tokens = 30
    books.clock.advance(DAY_S)
    books.tokens = 0
    assert await quota.learn(ALICE) == 0


@pytest.mark.parametrize("is_gone", [False, True])
async def test_an_erasure_that_failed_changes_no_sum(is_gone: bool) -> None:
    """Whether the store had forgotten the user by then is seen from its sum: nothing counts twice."""
    quota, books = turn_quota(tokens_per_day=100)
    books.tokens = 60
    quota.note_erasure(ALICE, await quota.measure(ALICE))
    books.tokens = 0 if is_gone else 60
    assert await quota.learn(ALICE) == 60
    books.tokens += 20
    books.clock.advance(KNOWN_S + 1)
    assert await quota.learn(ALICE) == 80
    again = await quota.measure(ALICE)
    assert again is not None
    assert (again.tokens, again.stored) == (80, books.tokens)


async def test_without_a_limit_of_tokens_an_erasure_notes_nothing() -> None:
    """The store is not asked what the user has spent."""
    quota, books = turn_quota(concurrent=1)
    assert await quota.measure(ALICE) is None
    quota.note_erasure(ALICE, None)
    assert books.asked == 0


async def test_the_store_is_asked_again_after_a_while() -> None:
    """So other nodes' turns are seen; until then it is not asked, however many turns begin."""
    quota, books = turn_quota(tokens_per_day=100)
    for _ in range(50):
        assert await quota.learn(ALICE) == 0
    books.tokens = 70
    books.clock.advance(KNOWN_S + 1)
    assert await quota.learn(ALICE) == 70
    quota.forget(ALICE)
    books.tokens = 80
    assert await quota.learn(ALICE) == 80
    assert books.asked == 3


async def test_a_new_day_begins_at_midnight_utc() -> None:
    """What was known of yesterday does not count today."""
    quota, books = turn_quota(tokens_per_day=100)
    books.tokens = 100
    books.clock.advance(DAY_S - books.clock.now_ms() / 1000 % DAY_S - 0.5)
    assert await quota.learn(ALICE) == 100
    books.tokens = 0
    books.clock.advance(1)
    assert await quota.learn(ALICE) == 0


async def test_what_ends_while_the_store_is_asked_counts() -> None:
    """Its answer may be of before: no turn's tokens are lost between it and what is remembered."""
    quota, books = turn_quota(tokens_per_day=100)
    books.gate.clear()
    learning = asyncio.ensure_future(quota.learn(ALICE))
    await books.is_asked.wait()
    quota.release(ALICE, 30)
    books.gate.set()
    assert await learning == 30
    assert await quota.learn(ALICE) == 30


async def test_the_store_is_asked_twice_and_answers_the_second_first() -> None:
    """Both askers get an answer, and what ended meanwhile is in what is remembered after either."""
    quota, books = turn_quota(tokens_per_day=1000)
    books.tokens = 500
    first, second = books.hold(), books.hold()
    learning = [asyncio.ensure_future(quota.learn(ALICE)) for _ in range(2)]
    await books.wait_asked(2)
    second.set()
    assert await learning[1] == 500
    quota.release(ALICE, 100)
    assert await quota.learn(ALICE) == 600
    first.set()
    assert await learning[0] == 600
    assert await quota.learn(ALICE) == 600
    quota.release(ALICE, 1)
    assert await quota.learn(ALICE) == 601


async def test_what_no_provider_has_counted_counts_here() -> None:
    """Beside the store's sum, whenever it is read, through an erasure, and until the day is over."""
    quota, books = turn_quota(tokens_per_day=100)
    books.tokens = 20
    assert await quota.learn(ALICE) == 20
    quota.note_uncounted(ALICE, 10)
    quota.note_uncounted(None, 10)
    assert await quota.learn(ALICE) == 30
    first = books.hold()
    quota.forget(ALICE)
    learning = asyncio.ensure_future(quota.learn(ALICE))
    await books.wait_asked(2)
    quota.note_uncounted(ALICE, 5)
    first.set()
    assert await learning == 35
    quota.note_erasure(ALICE, await quota.measure(ALICE))
    assert await quota.learn(ALICE) == 35
    books.tokens = 0
    quota.forget(ALICE)
    assert await quota.learn(ALICE) == 35
    assert await quota.learn(BOB) == 0
    books.clock.advance(DAY_S)
    assert await quota.learn(ALICE) == 0


async def test_without_limits_nothing_is_asked_or_counted() -> None:
    """The defaults: no turn costs a look at the store, and none is refused."""
    quota, books = turn_quota()
    for _ in range(100):
        assert quota.admit(ALICE, await quota.learn(ALICE)) == ()
        quota.release(ALICE, 10**9)
    assert books.asked == 0


async def test_requests_of_a_minute() -> None:
    """Exactly so many in any minute, each user's own; one that is out of sight makes room for one."""
    clock = FakeClock(monotonic_s=6000.0)
    quota = RequestQuota(MemoryCounter(clock), MemoryCounter(clock), clock, 10)
    left = [(await quota.take("alice")) for _ in range(10)]
    assert [q.remaining for q in left if q] == list(range(9, -1, -1))
    with pytest.raises(RateLimited) as refusal:
        await quota.take("alice")
    assert 0 < refusal.value.retry_after_s <= 60
    assert await quota.take("bob") is not None
    clock.advance(59)
    with pytest.raises(RateLimited):
        await quota.take("alice")
    clock.advance(1)
    assert [(await quota.take("alice")).remaining for _ in range(10)] == list(range(9, -1, -1))
    clock.advance(1000)
    assert (await quota.take("alice")).remaining == 9


@pytest.mark.parametrize("limit", [1, 2, 7])
async def test_no_minute_has_more_requests_than_there_may_be(limit: int) -> None:
    """Wherever it begins, however they come; and who was told to wait gets in after it, not before."""
    clock, dice = FakeClock(monotonic_s=6000.0), random.Random(limit)
    counter = MemoryCounter(clock)
    taken = []
    for _ in range(300):
        clock.advance(dice.choice((0, 0, 0.1, 1, 31, 70)) * dice.random())
        count = await counter.count("alice", limit, 60)
        if not count.is_in:
            assert 0 < count.reset_s <= 60
            clock.advance(count.reset_s - 0.001)
            assert not (await counter.count("alice", limit, 60)).is_in
            clock.advance(0.002)
            count = await counter.count("alice", limit, 60)
        assert count.is_in
        taken.append(clock.monotonic())
        assert sum(moment > clock.monotonic() - 60 for moment in taken) <= limit


class Silent:
    """A counter that fails as told, and counts how often it was asked."""

    def __init__(self, *, hangs: bool) -> None:
        self.asked = 0
        self._hangs = hangs

    async def count(self, user_id: str, limit: int, window_s: int) -> Count:
        self.asked += 1
        if self._hangs:
            await asyncio.Event().wait()
        raise StoreUnavailable()

    async def close(self) -> None: ...


@pytest.mark.parametrize("hangs", [False, True], ids=["refused", "silent"])
async def test_while_a_counter_is_away_this_process_counts(
    hangs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As many get in as there may be, it is not asked each time, and the log says so once a minute."""
    clock, counter = FakeClock(), Silent(hangs=hangs)
    quota = RequestQuota(counter, MemoryCounter(clock), clock, 3)
    with caplog.at_level(logging.WARNING):
        assert [(await quota.take("alice")).remaining for _ in range(3)] == [2, 1, 0]
        with pytest.raises(RateLimited):
            await quota.take("alice")
        assert (await quota.take("bob")).remaining == 2
        assert counter.asked == 1
        clock.advance(PAUSE_S)
        with pytest.raises(RateLimited):
            await quota.take("alice")
        assert counter.asked == 2
        assert len(caplog.records) == 1
        clock.advance(COMPLAIN_S)
        await quota.take("alice")
    assert len(caplog.records) == 2


async def test_so_many_at_once_that_the_counter_is_late_are_counted() -> None:
    """All wait for it together, and of all only so many get in as there may be."""
    clock, counter = FakeClock(), Silent(hangs=True)
    quota = RequestQuota(counter, MemoryCounter(clock), clock, 20)
    taken = await asyncio.gather(*(quota.take("alice") for _ in range(600)), return_exceptions=True)
    assert sum(isinstance(each, Quota) for each in taken) == 20
    assert sum(isinstance(each, RateLimited) for each in taken) == 580


@pytest.mark.parametrize("url", ["memory", "sqlite:///a.db", "http://secret", ""])
def test_a_counter_is_memory_or_redis(url: str) -> None:
    """Anything else is refused without being repeated, since it may hold a password."""
    with pytest.raises(ValueError) as refusal:
        open_counter(url, FakeClock())
    assert "redis://" in str(refusal.value)
    assert "secret" not in str(refusal.value)
