"""Measure what a live agent costs, how long an evicted one takes to come back, how the store grows.

    python3 scripts/dev.py measure [--agents 10000] [--distinct 20000] [--restores 500]
        [--sessions 100000] [--events 10000] [--turns 1000] [--json]

Works on the built-in demo model and a SQLite file in a temporary folder, in one process and
without HTTP, so that nothing but the pool, the agents and the store is measured.
"""

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator

from measure_pool import pool_of
from measure_store import measure_branches, measure_events, measure_lists
from rich.console import Console
from rich.progress import track

from app import Runtime
from app.domain.ids import SessionKey
from app.telemetry.memory import read_memory

CONCURRENCY = 32
MESSAGES = ("My name is Alice", "What is my name?")
_console = Console(stderr=True)


async def visit(runtime: Runtime, names: list[str], messages: tuple[str, ...], title: str) -> list[int]:
    """Chat in every session, some at a time; return the resident bytes after each tenth."""
    readings = []
    tenth = max(1, len(names) // 10)
    for start in track(range(0, len(names), tenth), title, console=_console, transient=True):
        await chat_in_each(runtime, iter(names[start : start + tenth]), messages)
        readings.append(resident())
    return readings


async def chat_in_each(runtime: Runtime, names: Iterator[str], messages: tuple[str, ...]) -> None:
    async def worker() -> None:
        for name in names:  # shared: each worker takes the next one
            for message in messages:
                await runtime.chat.chat(name, message)

    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))


def resident() -> int:
    gc.collect()
    return read_memory().rss_bytes


async def measure_agents(count: int) -> dict[str, float]:
    """Resident bytes of one idle live agent with two turns behind it, and of its history as JSON."""
    # Without the logs of ended turns, which have a budget of their own (STREAM_REPLAY_BYTES).
    async with pool_of(count + 1, stream_replay_bytes=0) as runtime:
        before = resident()
        names = [f"agent-{n}" for n in range(count)]
        await visit(runtime, names, MESSAGES, "live agents")
        grown = resident() - before
        history = await runtime.sessions.history(SessionKey("", names[-1]))
        texts = [text for turn in history.turns for text in (turn.input, turn.reply or "")]
        json_bytes = len(json.dumps([{"role": "assistant", "content": text} for text in texts]))
        live = runtime.agents.stats().idle
    return {
        "agents": live,
        "kib_per_agent": grown / live / 1024,
        "history_json_kib": json_bytes / 1024,
        "kib_beyond_history": (grown / live - json_bytes) / 1024,
    }


async def measure_flatness(count: int) -> dict[str, float]:
    """Resident bytes while this many distinct sessions pass through 100 places."""
    async with pool_of(100) as runtime:
        readings = await visit(
            runtime, [f"pass-{n}" for n in range(count)], MESSAGES[:1], "distinct sessions"
        )
        stats = runtime.agents.stats()
    mib = [reading / 2**20 for reading in readings]
    return {
        "sessions": count,
        "live_at_the_end": stats.total,
        "evictions": stats.evictions["lru"],
        "rss_mib_after_a_tenth": mib[0],
        "rss_mib_half_way": mib[4],
        "rss_mib_at_the_end": mib[-1],
    }


async def measure_restores(count: int, turns: int = 10) -> dict[str, float]:
    """How long the turn of an evicted session of 20 messages takes beyond that of a warm one; ms."""
    async with pool_of(1) as runtime:
        for name in ("one", "two"):
            for _ in range(turns):
                await runtime.chat.chat(name, "a message of ordinary length, about forty chars")
        restore_ms = []
        for n in track(range(count), "restores", console=_console, transient=True):
            key = SessionKey("", ("one", "two")[n % 2])
            started = time.perf_counter()
            async with runtime.agents.lease(key) as lease:
                restore_ms.append((time.perf_counter() - started) * 1000)
                assert lease.activation == "restored"
                lease.give_back()
    cuts = statistics.quantiles(restore_ms, n=100)
    return {"restores": count, "p50_ms": cuts[49], "p95_ms": cuts[94], "p99_ms": cuts[98]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--distinct", type=int, default=20_000)
    parser.add_argument("--restores", type=int, default=500)
    parser.add_argument("--sessions", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results = {
        "idle agent": asyncio.run(measure_agents(given.agents)),
        "distinct sessions through 100 places": asyncio.run(measure_flatness(given.distinct)),
        "restore of 20 messages": asyncio.run(measure_restores(given.restores)),
        "lists of sessions, p95": asyncio.run(measure_lists(given.sessions)),
        "events of a session, p95": asyncio.run(measure_events(given.events)),
        "a long session, p95": asyncio.run(measure_branches(given.turns)),
    }
    if given.json:
        json.dump(results, sys.stdout)
        return
    for title, figures in results.items():
        print(title)
        for name, value in figures.items():
            print(f"  {name:34} {value:,.2f}" if isinstance(value, float) else f"  {name:34} {value:,}")


if __name__ == "__main__":
    main()
