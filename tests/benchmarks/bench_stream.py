"""From an event to the bytes of those who watch: one frame, a turn that is over, one that runs."""

import asyncio

import pytest

from app.api.exchange import Exchange
from app.api.native.encoder import NativeEncoder
from app.api.push import PUSH_KEY
from app.api.sse import EventStream
from app.domain.events import TextDelta, TurnCancelled
from app.domain.turn import CancelReason
from app.services.turn_log import TurnLog
from tests.benchmarks.conftest import Run
from tests.unit.api.wire import PushingWire, http_scope

TURN = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"
TOKENS = 100
pytestmark = pytest.mark.benchmark(group="streams")
END = TurnCancelled(CancelReason.USER, False, None, 0)


def make_encoder() -> NativeEncoder:
    return NativeEncoder(Exchange(path="/chat/stream", request_id="r1", session_id="s", turn_id=TURN))


def make_log() -> TurnLog:
    log = TurnLog(TURN)
    for number in range(TOKENS):
        log.append(TextDelta(f" token{number}"))
    log.close(END)
    return log


async def watch(log: TurnLog, *, pushes: bool = False) -> bytes:
    wire = PushingWire()
    scope = http_scope(**{PUSH_KEY: wire.push}) if pushes else http_scope()
    await EventStream(log, make_encoder())(scope, wire.receive, wire.send)
    return wire.body


def test_encode_a_delta(benchmark) -> None:
    """One text delta as a frame."""
    frame = benchmark(make_encoder().encode, TURN, 7, TextDelta(" token"))
    assert frame.startswith(b"id: ")


def test_first_watcher(benchmark, run: Run) -> None:
    """A turn of 100 tokens that is over, encoded for the first who asks."""
    body = benchmark.pedantic(
        lambda log: run(watch(log)), setup=lambda: ((make_log(),), {}), rounds=200, warmup_rounds=10
    )
    assert body.count(b"event: text.delta") == TOKENS


def test_next_watcher(benchmark, run: Run) -> None:
    """The same for everybody after: the frames are there."""
    log = make_log()
    run(watch(log))
    body = benchmark(lambda: run(watch(log)))
    assert body.count(b"event: text.delta") == TOKENS


@pytest.mark.parametrize("pushes", [True, False], ids=["pushed", "sent"])
@pytest.mark.parametrize("watchers", [1, 10, 100])
def test_live_turn(benchmark, run: Run, watchers: int, pushes: bool) -> None:
    """A turn of 100 tokens that come one by one, to all who watch it, with and without a way around ASGI."""

    async def turn() -> list[bytes]:
        log = TurnLog(TURN)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(watch(log, pushes=pushes)) for _ in range(watchers)]
            for number in range(TOKENS):
                await asyncio.sleep(0)
                log.append(TextDelta(f" token{number}"))
            log.close(END)
        return [task.result() for task in tasks]

    bodies = benchmark(lambda: run(turn()))
    assert {body.count(b"event: text.delta") for body in bodies} == {TOKENS}
