"""Watching a turn's log: positions, sharing, silence, and clients that leave."""

import asyncio
from collections.abc import Awaitable

from app.api.push import PUSH_KEY
from app.api.sse import HEARTBEAT, RETRY, WRITE_BYTES, EventStream, StoredEvents
from app.domain.events import TextDelta, TurnCancelled, TurnEvent, TurnFailed
from app.domain.turn import CancelReason, TurnError
from app.services.turn_log import Take, TurnLog, Watch
from tests.unit.api.wire import PushingWire, Wire, http_scope

END = TurnCancelled(CancelReason.USER, False, None, 0)


class PlainEncoder:
    """Frames that show who encoded them."""

    face = "plain"

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.encoded = 0

    def encode(self, turn_id: str, seq: int, event: TurnEvent) -> bytes:
        self.encoded += 1
        kind = event.text if isinstance(event, TextDelta) else type(event).__name__
        return f"{seq}:{kind}{self.name}\n\n".encode()


def log_of(*texts: str, end: TurnEvent | None = END) -> TurnLog:
    log = TurnLog("t")
    for text in texts:
        log.append(TextDelta(text))
    if end is not None:
        log.close(end)
    return log


async def watch(log: TurnLog, wire: Wire, **options) -> None:
    options.setdefault("encoder", PlainEncoder())
    await EventStream(log, **options)(http_scope(), wire.receive, wire.send)


async def written(wire: Wire, text: bytes) -> None:
    while text not in wire.body:
        wire.arrived.clear()
        await wire.arrived.wait()


async def test_a_finished_log_is_sent_in_one_write() -> None:
    """Head, ``retry`` once, all whole events together, the end."""
    wire = Wire()
    await watch(log_of("a", "b"), wire)
    assert wire.status == 200
    assert wire.headers["content-type"] == "text/event-stream"
    assert wire.headers["cache-control"] == "no-cache"
    assert wire.headers["x-accel-buffering"] == "no"
    assert "content-length" not in wire.headers
    assert wire.writes == [RETRY + b"1:a\n\n2:b\n\n3:TurnCancelled\n\n", b""]
    assert wire.is_complete


async def test_a_position_leaves_out_what_was_seen() -> None:
    """Only events behind the position are sent."""
    wire = Wire()
    await watch(log_of("a", "b"), wire, position=2)
    assert wire.writes == [RETRY + b"3:TurnCancelled\n\n", b""]


async def test_events_are_sent_as_they_come() -> None:
    """Each event is out before the next one is in, and the stream ends with the terminal one."""
    log, wire = log_of("a", end=None), Wire()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch(log, wire))
        await written(wire, b"1:a")
        log.append(TextDelta("b"))
        await written(wire, b"2:b")
        log.close(END)
    assert wire.writes == [RETRY + b"1:a\n\n", b"2:b\n\n", b"3:TurnCancelled\n\n"]
    assert wire.is_complete


async def test_silence_is_filled() -> None:
    """A comment line goes out when nothing happens, again and again."""
    log, wire = log_of(end=None), Wire()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch(log, wire, heartbeat_s=0.001))
        await written(wire, HEARTBEAT * 3)
        log.close(END)
    assert HEARTBEAT.startswith(b":")
    assert wire.body.endswith(b"1:TurnCancelled\n\n")


async def test_who_is_not_silent_gets_no_filler() -> None:
    """Events put the comment off, although the timer is not moved by them."""
    log, wire = log_of(end=None), Wire()
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch(log, wire, heartbeat_s=0.05))
        begun, count = loop.time(), 0
        while loop.time() < begun + 0.2:
            count += 1
            log.append(TextDelta("x"))
            await written(wire, b"%d:x" % count)
        log.close(END)
    assert HEARTBEAT not in wire.body


async def test_from_the_middle_nothing_before_it_is_encoded() -> None:
    """The frames of a long log that nobody watched so far are made as they are needed."""
    log, late, early = log_of(*"abcd"), PlainEncoder(), PlainEncoder()
    wire = Wire()
    await watch(log, wire, encoder=late, position=3)
    assert wire.writes[0] == RETRY + b"4:d\n\n5:TurnCancelled\n\n"
    assert late.encoded == 2
    wire = Wire()
    await watch(log, wire, encoder=early)
    assert wire.writes[0] == RETRY + b"1:a\n\n2:b\n\n3:c\n\n4:d\n\n5:TurnCancelled\n\n"
    assert early.encoded == 3


async def test_watchers_share_frames() -> None:
    """However many watch, an event is encoded once."""
    log, encoders = log_of("a", "b"), [PlainEncoder(), PlainEncoder(), PlainEncoder()]
    wires = [Wire() for _ in encoders]
    for wire, encoder in zip(wires, encoders, strict=True):
        await watch(log, wire, encoder=encoder)
    assert [encoder.encoded for encoder in encoders] == [3, 0, 0]
    assert len({wire.body for wire in wires}) == 1


async def test_a_failure_names_its_own_watcher() -> None:
    """The one frame that depends on the request is encoded for each."""
    log = log_of("a", end=TurnFailed(TurnError("MODEL_ERROR", "No.")))
    bodies = []
    for name in ("x", "y"):
        wire = Wire()
        await watch(log, wire, encoder=PlainEncoder(name))
        bodies.append(wire.body)
    assert b"2:TurnFailedx" in bodies[0]
    assert b"2:TurnFailedy" in bodies[1]
    assert b"1:ax" in bodies[1]


async def test_a_long_backlog_goes_out_in_pieces_of_whole_events() -> None:
    """No write grows beyond its bound by more than one event, and none splits an event."""
    wire = Wire()
    await watch(log_of(*["x" * 1000] * 500), wire)
    pieces = wire.writes[:-1]
    assert len(pieces) > 5
    assert all(piece.endswith(b"\n\n") for piece in pieces)
    assert max(map(len, pieces)) < WRITE_BYTES + 1100


class SpiedLog(TurnLog):
    """Remembers who watched it."""

    def watch(self, limit_s: float, take: Take | None = None) -> Watch:
        self.last_watch = super().watch(limit_s, take)
        return self.last_watch


async def test_a_client_that_leaves_is_noticed_at_once() -> None:
    """The stream ends without a further event, says so once, and leaves no waiter, timer or task behind."""
    log, wire, left = SpiedLog("t"), Wire(), []
    log.append(TextDelta("a"))
    async with asyncio.TaskGroup() as group:
        group.create_task(watch(log, wire, on_end=lambda: left.append(True)))
        await written(wire, b"1:a")
        wire.hang_up()
    assert left == [True]
    assert not wire.is_complete
    assert log._watches == {}
    assert log.last_watch._timer.cancelled()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_server_whose_send_never_waits_is_not_blocked_by_a_long_log() -> None:
    """A departure is noticed while a backlog is being sent, and others have their turn."""
    wire, encoder = Wire(), PlainEncoder()
    log = log_of(*["x" * 1000] * 10_000, end=None)
    async with asyncio.TaskGroup() as group:
        group.create_task(watch(log, wire, encoder=encoder))
        await written(wire, b"1:x")
        wire.hang_up()
    assert encoder.encoded < 1000
    assert log._watches == {}


async def test_a_watcher_beyond_the_end_waits_in_silence() -> None:
    """Events that it claims to have seen are not sent, nor is anything in their place."""
    log, wire = log_of("a", end=None), Wire()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch(log, wire, position=3))
        await written(wire, RETRY)
        for text in "bcd":
            log.append(TextDelta(text))
            await asyncio.sleep(0)
        await written(wire, b"4:d")
        log.close(END)
    assert wire.writes == [RETRY, b"4:d\n\n", b"5:TurnCancelled\n\n"]


async def test_the_end_is_told_once() -> None:
    """``on_end`` is called once when everything has been sent."""
    left: list[bool] = []
    await watch(log_of("a"), Wire(), on_end=lambda: left.append(True))
    assert left == [True]


async def test_a_server_that_says_it_by_oserror_is_understood() -> None:
    """An ``OSError`` from ``send`` is a departure, not a bug."""
    left: list[bool] = []

    async def broken(_message) -> None:
        raise OSError("gone")

    wire = Wire()
    stream = EventStream(log_of("a"), PlainEncoder(), on_end=lambda: left.append(True))
    await stream(http_scope(), wire.receive, broken)
    assert left == [True]


async def test_a_log_that_closes_without_an_end_ends_the_stream() -> None:
    """A turn that was refused while it waited leaves its watchers nothing to wait for."""
    log, wire = TurnLog("t"), Wire()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch(log, wire))
        await written(wire, RETRY)
        log.close()
    assert wire.writes == [RETRY, b""]


async def watch_pushed(log: TurnLog, wire: PushingWire, **options) -> None:
    stream = EventStream(log, PlainEncoder(), **options)
    await stream(http_scope(**{PUSH_KEY: wire.push}), wire.receive, wire.send)


async def test_an_event_is_pushed_in_the_step_in_which_it_is_logged() -> None:
    """Where the server takes parts at once, no task runs between; the end goes the usual way."""
    log, wire = log_of("a", end=None), PushingWire()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch_pushed(log, wire))
        await written(wire, b"1:a")
        await asyncio.sleep(0)
        log.append(TextDelta("b"))
        log.append(TextDelta("c"))
        assert wire.pushed == [b"2:b\n\n", b"3:c\n\n"]
        log.close(END)
    assert wire.writes == [RETRY + b"1:a\n\n", *wire.pushed, b"4:TurnCancelled\n\n"]
    assert wire.is_complete


async def test_what_the_connection_does_not_take_is_sent_in_order() -> None:
    """While it refuses, the task sends and waits, all together; afterwards it is pushed again."""
    log, wire = log_of("a", end=None), PushingWire()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch_pushed(log, wire))
        await written(wire, b"1:a")
        await asyncio.sleep(0)
        wire.takes = False
        log.append(TextDelta("b"))
        wire.takes = True
        log.append(TextDelta("c"))  # not before the one that waits
        await written(wire, b"3:c")
        await asyncio.sleep(0)
        log.append(TextDelta("d"))
        assert wire.pushed == [b"4:d\n\n"]
        log.close(END)
    assert wire.writes == [RETRY + b"1:a\n\n", b"2:b\n\n3:c\n\n", b"4:d\n\n", b"5:TurnCancelled\n\n"]


async def test_pushed_events_put_silence_off() -> None:
    """The comment goes out after silence only, also when the task sleeps through all events."""
    log, wire = log_of(end=None), PushingWire()
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch_pushed(log, wire, heartbeat_s=0.05))
        await written(wire, RETRY)
        begun = loop.time()
        while loop.time() < begun + 0.2:
            log.append(TextDelta("x"))
            await asyncio.sleep(0)
        assert HEARTBEAT not in wire.body
        await written(wire, HEARTBEAT)
        log.close(END)
    assert len(wire.pushed) > 3


async def test_pushing_skips_what_was_seen() -> None:
    """Events that a client claims to have seen are not pushed, nor is anything in their place."""
    log, wire = log_of("a", end=None), PushingWire()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch_pushed(log, wire, position=3))
        await written(wire, RETRY)
        await asyncio.sleep(0)
        for text in "bcd":
            log.append(TextDelta(text))
        assert wire.pushed == [b"4:d\n\n"]
        log.close(END)
    assert wire.writes == [RETRY, b"4:d\n\n", b"5:TurnCancelled\n\n"]


async def test_a_watcher_that_breaks_does_not_break_the_turn() -> None:
    """What goes wrong while an event is pushed ends that response; the log takes the event, and the next."""
    log, wire = log_of("a", end=None), PushingWire()

    def broken(_body: bytes) -> bool:
        raise RuntimeError("broken")

    wire.push = broken  # type: ignore[method-assign]
    async with asyncio.TaskGroup() as group:
        shown = group.create_task(caught(watch_pushed(log, wire)))
        await written(wire, b"1:a")
        await asyncio.sleep(0)
        log.append(TextDelta("b"))
        log.append(TextDelta("c"))
    assert str(shown.result()) == "broken"
    assert len(log.events) == 3
    assert log._watches == {}


async def caught(watching: Awaitable[None]) -> Exception | None:
    try:
        await watching
    except Exception as error:
        return error
    return None


async def test_stored_events_are_sent_with_their_own_numbers() -> None:
    """A turn from the store keeps the numbers it had when it was live."""
    wire = Wire()
    events = [(1, TextDelta("a")), (9, END)]
    await StoredEvents("t", events, PlainEncoder())(http_scope(), wire.receive, wire.send)
    assert wire.writes == [RETRY, b"1:a\n\n9:TurnCancelled\n\n", b""]
    assert wire.is_complete
