"""Drive a running server with many sessions at once and prove that none hears another.

Each session first says its own name, in English or Chinese, and later asks for it. With the
built-in demo model every reply must hold that name and no other session's, and
``turn_count`` must grow by exactly one with each answer. Other models need not know the name,
but must never say someone else's; with ``--expect-echo`` they must repeat the message.

Sessions take their turns in random order (``--seed``), so that some find their agent in the
pool and others are restored. Nothing is repeated: an error ends its session, and any error
or wrong answer makes the exit code 1.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou")
CHARACTERS = "明远山川海林森江河湖星云雨雪风霜松柏竹梅兰菊桂莲峰岩泉溪波涛洋月华光辉晨曦阳春"
MAX_SESSIONS = 100_000
# Every name has this shape and nothing else does, so one search finds all names in a reply.
ANY_NAME = re.compile(rf"Q(?:{'|'.join(SYLLABLES)}){{4}}|亓[{CHARACTERS}]{{3}}")
WRONG_SHOWN = 5
PERCENTILES = (50, 95, 99)


@dataclass(slots=True)
class Session:
    """One conversation as the client knows it."""

    session_id: str
    name: str
    is_chinese: bool
    turns: int = 0
    is_demo: bool = False

    def next_message(self) -> str:
        if self.turns == 0:
            return f"你好，我叫{self.name}。" if self.is_chinese else f"My name is {self.name}."
        if self.is_demo:
            return "我叫什么名字？" if self.is_chinese else "What is my name?"
        return f"{self.name}: {self.turns + 1}"


@dataclass(slots=True)
class Answer:
    """One finished turn, from either route. ``first_token_s`` is known for streamed turns only."""

    reply: str
    provider: str
    activation: str
    turn_count: int
    message_count: int
    first_token_s: float | None = None


class TurnError(Exception):
    """A turn did not finish; ``code`` is the server's, or says what broke the connection."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True)
class Tally:
    """What was measured. Times are in seconds."""

    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    first_tokens: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def turns(self) -> int:
        return sum(map(len, self.latencies.values()))

    @property
    def is_clean(self) -> bool:
        return self.turns > 0 and not self.errors and not self.wrong


def make_sessions(count: int, run: str) -> list[Session]:
    """Return sessions with names of their own; another run has other names."""
    offset = random.Random(run).randrange(len(CHARACTERS) ** 3)
    return [
        Session(f"load-{run}-{number}", make_name(number // 2 + offset, is_chinese), is_chinese)
        for number, is_chinese in ((number, number % 2 == 1) for number in range(count))
    ]


def make_name(number: int, is_chinese: bool) -> str:
    parts, length = (CHARACTERS, 3) if is_chinese else (SYLLABLES, 4)
    digits = (number // len(parts) ** place % len(parts) for place in range(length))
    return ("亓" if is_chinese else "Q") + "".join(parts[digit] for digit in digits)


def find_wrong(session: Session, answer: Answer, must_name: bool) -> str | None:
    """Return what is wrong with the answer to the session's latest message."""
    named = set(ANY_NAME.findall(answer.reply))
    if named - {session.name}:
        return f"{session.session_id} ({session.name}) was told {', '.join(sorted(named))}"
    if must_name and not named:
        return f"{session.session_id} ({session.name}) was not recognised: {answer.reply[:80]!r}"
    expected = (session.turns, 2 * session.turns)
    if (answer.turn_count, answer.message_count) != expected:
        counts = f"{answer.turn_count} turns, {answer.message_count} messages"
        return f"{session.session_id} has {counts} instead of {expected[0]}, {expected[1]}"
    return None


# The two routes


async def chat(http: aiohttp.ClientSession, body: dict[str, Any]) -> Answer:
    async with http.post("/chat", json=body) as response:
        await refuse_problem(response)
        return to_answer(await response.json())


async def chat_stream(http: aiohttp.ClientSession, body: dict[str, Any]) -> Answer:
    began = time.perf_counter()
    first_token_s, text, started = None, "", {}
    async with http.post("/chat/stream", json=body) as response:
        await refuse_problem(response)
        async for event in read_events(response):
            kind = event["type"]
            if kind == "turn.started":
                started = event
            elif kind == "text.delta":
                first_token_s = first_token_s or time.perf_counter() - began
                text += event["text"]
            elif kind in ("turn.failed", "turn.cancelled"):
                raise TurnError(event.get("code", kind))
            elif kind == "turn.finished":
                if event["reply"] != text:
                    raise TurnError("client: the deltas are not the reply")
                return to_answer(started | event, first_token_s)
    raise TurnError("client: the stream ended early")


async def read_events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data:"):
            yield json.loads(line[5:])


async def refuse_problem(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    try:
        code = (await response.json(content_type=None))["code"]
    except (ValueError, LookupError, TypeError):
        code = f"client: status {response.status} without a problem document"
    raise TurnError(code)


def to_answer(data: dict[str, Any], first_token_s: float | None = None) -> Answer:
    try:
        return Answer(
            reply=data["reply"],
            provider=data["provider"],
            activation=data["activation"],
            turn_count=data["turn_count"],
            message_count=data["message_count"],
            first_token_s=first_token_s,
        )
    except KeyError as missing:
        raise TurnError(f"client: the answer has no {missing}") from None


# The load


class Load:
    """Turns of all sessions, ``concurrency`` at a time. A session never has two at once."""

    def __init__(self, options: argparse.Namespace, http: aiohttp.ClientSession, run: str) -> None:
        self.tally = Tally()
        self._options = options
        self._http = http
        self._random = random.Random(options.seed)
        self._ready = make_sessions(options.sessions, run)

    async def run(self, progress: Progress, task: TaskID) -> None:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(self._options.concurrency):
                group.create_task(self._work(progress, task), name=f"client {number}")
        self.tally.duration_s = time.perf_counter() - began

    async def _work(self, progress: Progress, task: TaskID) -> None:
        while self._ready:
            session = self._take_session()
            has_gone_on = await self._take_turn(session)
            progress.advance(task)
            if has_gone_on and session.turns < self._options.turns:
                self._ready.append(session)

    def _take_session(self) -> Session:
        chosen = self._random.randrange(len(self._ready))
        self._ready[chosen], self._ready[-1] = self._ready[-1], self._ready[chosen]
        return self._ready.pop()

    async def _take_turn(self, session: Session) -> bool:
        """Carry out one turn; say whether the session can go on."""
        body = {"session_id": session.session_id, "message": session.next_message()}
        is_streamed = self._options.stream or self._random.random() < self._options.stream_share
        ask = chat_stream if is_streamed else chat
        began = time.perf_counter()
        try:
            answer = await ask(self._http, body)
        except TurnError as error:
            self.tally.errors[error.code] += 1
            return False
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self.tally.errors[f"client: {type(error).__name__}"] += 1
            return False
        self._note(session, answer, time.perf_counter() - began)
        return True

    def _note(self, session: Session, answer: Answer, latency_s: float) -> None:
        session.turns += 1
        session.is_demo = answer.provider == "demo"
        self.tally.latencies[answer.activation].append(latency_s)
        if answer.first_token_s is not None:
            self.tally.first_tokens.append(answer.first_token_s)
        must_name = session.is_demo or self._options.expect_echo
        if wrong := find_wrong(session, answer, must_name):
            self.tally.wrong.append(wrong)


# The report


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Return the nearest-rank percentiles in milliseconds."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{p}": round(1000 * ordered[-(-len(ordered) * p // 100) - 1], 2) for p in PERCENTILES}


def make_report(tally: Tally, before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    everything = [latency for latencies in tally.latencies.values() for latency in latencies]
    return {
        "turns": tally.turns,
        "duration_s": round(tally.duration_s, 3),
        "turns_per_s": round(tally.turns / tally.duration_s, 1) if tally.duration_s else 0.0,
        "latency_ms": percentiles(everything),
        "first_token_ms": percentiles(tally.first_tokens),
        "activation": {
            name: {"turns": len(values), "share": round(len(values) / tally.turns, 4)}
            | {"latency_ms": percentiles(values)}
            for name, values in sorted(tally.latencies.items())
        },
        "errors": dict(tally.errors.most_common()),
        "wrong_answers": len(tally.wrong),
        "wrong_shown": tally.wrong[:WRONG_SHOWN],
        "pool": pool_change(before, after) if before and after else None,
    }


def pool_change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return what the pool counted meanwhile, and its size at the end."""
    grown = {name: after[name] - before[name] for name in ("hits", "misses", "restores") if name in before}
    evictions = {
        cause: count - before["evictions"].get(cause, 0) for cause, count in after["evictions"].items()
    }
    size = {name: after.get(name) for name in ("total_agents", "max_agents", "memory")}
    return grown | {"evictions": evictions} | size


def show(report: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{report['turns']} turns in {report['duration_s']} s: {report['turns_per_s']} turns/s"
    )
    for heading in ("", "turns", "share", *(f"p{p} ms" for p in PERCENTILES)):
        table.add_column(heading, justify="right")
    add_times(table, "latency", report["latency_ms"], str(report["turns"]))
    for name, part in report["activation"].items():
        add_times(table, name, part["latency_ms"], str(part["turns"]), f"{part['share']:.1%}")
    add_times(table, "first token", report["first_token_ms"])
    console.print(table)
    if report["pool"]:
        console.print("pool:", json.dumps(report["pool"]), markup=False, highlight=False)
    console.print(f"errors: {json.dumps(report['errors'])}", markup=False, highlight=False)
    console.print(f"wrong answers: {report['wrong_answers']}", highlight=False)
    for wrong in report["wrong_shown"]:
        console.print(f"  {wrong}", markup=False, highlight=False)


def add_times(
    table: Table, name: str, times: dict[str, float] | None, turns: str = "", share: str = ""
) -> None:
    if times is not None:
        table.add_row(name, turns, share, *(f"{value:.1f}" for value in times.values()))


# The command


@asynccontextmanager
async def open_http(options: argparse.Namespace) -> AsyncIterator[aiohttp.ClientSession]:
    headers = dict(header.split(":", 1) for header in options.header)
    async with aiohttp.ClientSession(
        options.url,
        headers={name.strip(): value.strip() for name, value in headers.items()},
        connector=aiohttp.TCPConnector(limit=options.concurrency + 1),
        timeout=aiohttp.ClientTimeout(total=options.timeout),
        read_bufsize=2**22,
    ) as http:
        yield http


async def find_stats(http: aiohttp.ClientSession) -> dict[str, Any] | None:
    """Return the pool's statistics, ``None`` where they are not for us to read."""
    async with http.get("/agent-stats") as response:
        return await response.json() if response.status == 200 else None


async def drive(options: argparse.Namespace) -> dict[str, Any]:
    run = f"{int(time.time() * 1000):x}"
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=options.quiet or options.json,
    )
    async with open_http(options) as http:
        before = await find_stats(http)
        load = Load(options, http, run)
        with progress:
            await load.run(progress, progress.add_task("turns", total=options.sessions * options.turns))
        after = await find_stats(http)
    return make_report(load.tally, before, after) | {"clean": load.tally.is_clean}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py load-test", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (%(default)s)")
    parser.add_argument("--sessions", type=int, default=200, help="how many sessions (%(default)s)")
    parser.add_argument("--turns", type=int, default=10, help="turns of each session (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="turns at a time (%(default)s)")
    parser.add_argument("--stream", action="store_true", help="stream every turn")
    parser.add_argument(
        "--stream-share", type=float, default=0.1, help="share of streamed turns (%(default)s)"
    )
    parser.add_argument("--expect-echo", action="store_true", help="replies must repeat what was said")
    parser.add_argument(
        "--header", action="append", default=[], metavar="NAME:VALUE", help="for every request"
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one turn (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of turns (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    if not 1 <= options.sessions <= MAX_SESSIONS or options.turns < 1 or options.concurrency < 1:
        parser.error(f"sessions: 1 to {MAX_SESSIONS}; turns and concurrency: at least 1")
    if any(":" not in header for header in options.header):
        parser.error("a header is NAME:VALUE")
    return options


def main() -> None:
    options = parse_arguments()
    try:
        report = asyncio.run(drive(options))
    except (aiohttp.ClientError, TimeoutError) as error:
        sys.exit(f"load-test: no server answers at {options.url} ({type(error).__name__})")
    except KeyboardInterrupt:
        sys.exit(130)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        show(report, Console())
    sys.exit(0 if report["clean"] else 1)


if __name__ == "__main__":
    main()
