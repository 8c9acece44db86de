"""Who is refused while the process is overloaded: windows of lag and commits by hand, and the probe."""

import asyncio
from collections import Counter

import pytest

from app.domain.errors import Overloaded
from app.services.overload import (
    BACKOFF,
    CALM_WINDOWS,
    LEAST,
    LEAST_OF_ALL,
    RETRY_S,
    SAMPLES,
    SLOW_TICK_S,
    START,
    TICK_S,
    Burden,
    Gate,
    LagProbe,
    Place,
)
from tests.fakes import FakeClock

LAG_S = 0.05


class Bench:
    """A gate, and time that goes by in windows of ten samples."""

    def __init__(self) -> None:
        self.counted = Counter()
        self.gate = Gate(LAG_S, lambda error: self.counted.update([error.code]))
        self.clock = FakeClock()
        for _ in range(SAMPLES):  # the first window is no longer than it must be
            self.gate.note_lag(0.0, self.clock.monotonic())

    def windows(self, count: int, lag_s: float = 0.0, commit_s: float | None = None) -> None:
        for _ in range(10 * count):
            self.clock.advance(0.0101)
            if commit_s is not None:
                self.gate.note_commit(commit_s)
            self.gate.note_lag(lag_s, self.clock.monotonic())

    def turns(self, count: int) -> int:
        """Ask for so many turns at once; return how many were let in."""
        return sum(not self.is_refused() for _ in range(count))

    def is_refused(self, burden: Burden = Burden.TURN) -> bool:
        try:
            self.gate.enter(burden)
        except Overloaded:
            return True
        return False

    def end(self, count: int) -> None:
        for _ in range(count):
            self.gate.leave()


def test_at_once_only_so_many_come_in() -> None:
    """What comes in one moment, before anything can be felt, is bounded; exactly so many fit."""
    bench = Bench()
    assert bench.turns(START) == START
    assert bench.turns(5) == 0
    assert bench.counted == {"OVERLOADED": 5}
    bench.end(1)
    assert bench.turns(2) == 1


def test_calm_turns_are_never_too_many() -> None:
    """While neither the loop nor the store is behind, as with idle streams, the bound keeps ahead."""
    bench = Bench()
    for _ in range(40):
        assert bench.turns(250) == 250
        bench.windows(1, lag_s=0.001, commit_s=0.004)
    assert bench.gate.in_flight == 10_000


@pytest.mark.parametrize("strain", [{"lag_s": 0.06}, {"commit_s": 0.2}], ids=["lag", "commits"])
def test_overload_cuts_the_bound(strain: dict[str, float]) -> None:
    """A loop that lags, or a queue of commits, takes a tenth of what is in flight, once until it is felt."""
    bench = Bench()
    bench.windows(1, commit_s=0.002)
    assert bench.turns(600) == START
    bench.windows(1, **strain)
    assert bench.gate.limit == int(BACKOFF * START) == 460
    bench.windows(3, **strain)
    assert bench.gate.limit == 460
    bench.end(72)
    assert bench.turns(100) == 20
    bench.windows(1, **strain)
    assert bench.gate.limit == int(BACKOFF * 460)


@pytest.mark.parametrize("strain", [{"lag_s": 0.06}, {"commit_s": 0.2}], ids=["lag", "commits"])
def test_who_refuses_nobody_has_no_need_to(strain: dict[str, float]) -> None:
    """So many as are let in at the start may saturate the process for ever without being refused."""
    bench = Bench()
    bench.windows(1, commit_s=0.002)
    for _ in range(100):
        assert bench.turns(START) == START
        bench.windows(3, **strain)
        bench.end(START)
    assert bench.counted == {}


def test_a_slow_store_is_no_overload() -> None:
    """What counts is the wait beyond the shortest one ever, wherever the store may stand."""
    bench = Bench()
    assert bench.turns(500) == 500
    bench.windows(30, commit_s=0.7)
    assert bench.gate.limit > START


def test_a_stall_is_no_overload() -> None:
    """One sample of half a second among others changes nothing: the loop was stopped, not busy."""
    bench = Bench()
    bench.windows(2)
    bench.turns(400)
    bench.clock.advance(0.5)
    bench.gate.note_lag(0.5, bench.clock.monotonic())
    bench.windows(2)
    assert bench.gate.limit > START


@pytest.mark.parametrize(
    ("strain", "least"), [({"lag_s": 0.06}, LEAST_OF_ALL), ({"commit_s": 0.5}, LEAST)], ids=["lag", "commits"]
)
def test_the_bound_has_an_end(strain: dict[str, float], least: int) -> None:
    """However long it lasts: few for a loop that lags, enough to keep the store busy for a queue."""
    bench = Bench()
    bench.windows(1, commit_s=0.002)
    for _ in range(200):
        bench.turns(1000)
        bench.windows(1, **strain)
        bench.end(max(0, bench.gate.in_flight - int(bench.gate.limit) + 1))
    assert bench.gate.limit == least
    bench.windows(CALM_WINDOWS + 1)
    assert bench.gate.limit == START


def test_after_an_overload_the_bound_grows_slowly_then_doubles() -> None:
    """By a little with each calm window at first; when it stays calm, as fast as at the start."""
    bench = Bench()
    bench.turns(600)
    bench.windows(1, lag_s=0.1)
    bench.end(100)
    before = bench.gate.limit
    bench.windows(1)
    assert before < bench.gate.limit < 1.1 * before
    bench.windows(CALM_WINDOWS)
    assert bench.gate.limit == 2 * bench.gate.in_flight > START


def test_turns_go_first_then_others_and_some_never() -> None:
    """A choked loop refuses other requests too; what looks after the process gets through."""
    bench = Bench()
    bench.turns(START)
    assert bench.is_refused(Burden.TURN)
    assert not bench.is_refused(Burden.OTHER)
    bench.windows(1, lag_s=0.3)
    assert bench.is_refused(Burden.OTHER)
    assert not bench.is_refused(Burden.NONE)
    bench.windows(1)
    assert not bench.is_refused(Burden.OTHER)


def test_a_place_is_left_once() -> None:
    """It counts from its making to the first time it is left; where there is none, nothing counts."""
    bench = Bench()
    bench.turns(START - 1)
    place = Place(bench.gate)
    with pytest.raises(Overloaded):
        Place(bench.gate)
    assert bench.gate.in_flight == START
    place.leave()
    place.leave()
    assert bench.gate.in_flight == START - 1


def test_refusals_are_spread() -> None:
    """Those who are refused together are told to come back at different times."""
    bench = Bench()
    bench.turns(START)
    times = set()
    for _ in range(9):
        with pytest.raises(Overloaded) as refusal:
            bench.gate.enter(Burden.TURN)
        times.add(refusal.value.retry_after_s)
    assert times == set(range(1, RETRY_S + 1))


class Listener(Gate):
    """A gate that keeps what it is told; ``enough`` is set at the second time."""

    def __init__(self) -> None:
        super().__init__(LAG_S, lambda error: None)
        self.told = []
        self.enough = asyncio.Event()

    def note_lag(self, lag_s: float, now: float) -> None:
        self.told.append((lag_s, now))
        if len(self.told) == 2:
            self.enough.set()


@pytest.mark.parametrize(("turns", "tick_s"), [(LEAST_OF_ALL, TICK_S), (LEAST_OF_ALL - 1, SLOW_TICK_S)])
async def test_the_probe_sees_how_long_the_loop_is_busy(turns: int, tick_s: float) -> None:
    """Work that keeps the loop for so long is told as so much lag, soon if there are turns to refuse."""
    clock, gate = FakeClock(), Listener()
    for _ in range(turns):
        gate.enter(Burden.TURN)
    probe = LagProbe(clock, gate)
    clock.advance(tick_s + 0.02)
    await gate.enough.wait()
    assert gate.told == [(pytest.approx(0.02), clock.monotonic()), (0.0, clock.monotonic())]
    probe.stop()
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(2 * tick_s, later.set)
    await later.wait()
    assert len(gate.told) == 2
