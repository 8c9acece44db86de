"""What the store's answers cost as it grows: lists, events, branches, summaries; p95 in ms.

Called by ``measure.py``. SQLite in a temporary folder, through the services, without HTTP.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from measure_pool import pool_of
from rich.console import Console
from rich.progress import track

from app import Runtime
from app.domain.branch import Back
from app.domain.ids import SessionKey
from app.services.sessions import NewSession

BATCH = 1000
READINGS = 300
MESSAGE = "a message of ordinary length, about forty chars"
_console = Console(stderr=True)

Call = Callable[[], Awaitable[Any]]


async def p95(*calls: Call, readings: int = READINGS) -> list[float]:
    """Return the 95th percentiles of what each of ``calls`` takes, taken in turns; ms."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(readings + readings // 10):
        for call, times in zip(calls, taken, strict=True):
            started = time.perf_counter()
            await call()
            if number >= readings // 10:  # before that it warms up
                times.append((time.perf_counter() - started) * 1000)
    return [statistics.quantiles(times, n=20)[18] for times in taken]


async def measure_lists(sessions: int) -> dict[str, float]:
    """The newest 50 of a store of 100 sessions and of many; of a user with 100 and with a tenth of them."""
    async with pool_of(10) as few, pool_of(10) as many:
        for runtime, count in ((few, 100), (many, sessions)):
            await _make(runtime, 100, "few")
            await _make(runtime, count // 10, "many")
            await _make(runtime, count - count // 10, None)
        of_few, of_many = await p95(_list_of(few), _list_of(many))
        users_few, users_many = await p95(_list_of(many, "few"), _list_of(many, "many"))
        (stats,) = await p95(many.sessions.stats)
    return {
        "sessions": sessions,
        "newest_50_of_200_ms": of_few,
        "newest_50_of_all_ms": of_many,
        "ratio": of_many / of_few,
        "users_newest_50_of_100_ms": users_few,
        "users_newest_50_of_tenth_ms": users_many,
        "users_ratio": users_many / users_few,
        "stats_ms": stats,
    }


async def measure_events(events: int) -> dict[str, float]:
    """The newest page of events and an append, in a session of 100 events and of many."""
    async with pool_of(10) as runtime:
        for name, turns in (("few", 25), ("many", events // 4)):
            for _ in track(range(turns), "events", console=_console, transient=True):
                await runtime.chat.chat(name, "hello")
        page_few, page_many = await p95(_page_of(runtime, "few"), _page_of(runtime, "many"))
        append_few, append_many = await p95(_patch_of(runtime, "few"), _patch_of(runtime, "many"))
    return {
        "events": events,
        "first_page_of_100_ms": page_few,
        "first_page_of_all_ms": page_many,
        "page_ratio": page_many / page_few,
        "append_to_100_ms": append_few,
        "append_to_all_ms": append_many,
        "append_ratio": append_many / append_few,
    }


async def measure_branches(turns: int) -> dict[str, float]:
    """Loading a long session with a summary against a short one; checkpoints and moves of both."""
    async with pool_of(10) as runtime:
        for name, count in (("short", 20), ("long", turns - 20)):
            for _ in track(range(count), "turns", console=_console, transient=True):
                await runtime.chat.chat(name, MESSAGE)
        await runtime.chat.compact(SessionKey("", "long"))
        for _ in range(20):
            await runtime.chat.chat("long", MESSAGE)
        load_short, load_long = await p95(_load_of(runtime, "short"), _load_of(runtime, "long"))
        move_short, move_long = await p95(_move_of(runtime, "short"), _move_of(runtime, "long"))
    return {
        "turns": turns,
        "load_of_20_turns_ms": load_short,
        "load_of_all_with_summary_ms": load_long,
        "load_ratio": load_long / load_short,
        "checkpoint_rewind_restore_of_20_ms": move_short,
        "checkpoint_rewind_restore_of_all_ms": move_long,
        "move_ratio": move_long / move_short,
    }


def _list_of(runtime: Runtime, user_id: str | None = None) -> Call:
    return lambda: runtime.sessions.list(limit=50, user_id=user_id)


def _page_of(runtime: Runtime, session_id: str) -> Call:
    return lambda: runtime.sessions.events(session_id, limit=50)


def _patch_of(runtime: Runtime, session_id: str) -> Call:
    counter = iter(range(10**9))
    return lambda: runtime.sessions.patch_state(session_id, {"n": next(counter)})


def _load_of(runtime: Runtime, session_id: str) -> Call:
    async def load() -> None:
        runtime.agents.evict(SessionKey("", session_id))
        async with runtime.agents.lease(SessionKey("", session_id)) as lease:
            assert lease.activation == "restored"
            lease.give_back()

    return load


def _move_of(runtime: Runtime, session_id: str) -> Call:
    async def move() -> None:
        checkpoint = await runtime.sessions.create_checkpoint(session_id)
        await runtime.sessions.rewind(session_id, Back(1))
        await runtime.sessions.restore(session_id, checkpoint.checkpoint_id)
        await runtime.sessions.delete_checkpoint(session_id, checkpoint.checkpoint_id)

    return move


async def _make(runtime: Runtime, count: int, user_id: str | None) -> None:
    for start in track(range(0, count, BATCH), "sessions", console=_console, transient=True):
        many = [NewSession(user_id=user_id, title=f"t{n}") for n in range(start, min(start + BATCH, count))]
        await runtime.sessions.create_many(many)
        await asyncio.sleep(0)
