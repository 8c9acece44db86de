"""What becomes of calls when Redis stands still, goes away, forgets its scripts or loses replies."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from uuid import uuid4

import pytest
import uvloop

from app.domain.branch import Back
from app.domain.errors import StoreUnavailable
from app.domain.ids import SessionKey
from app.domain.session import Session, SessionChange
from app.domain.state import SharedState, StateScope
from app.domain.stats import UserUsage
from app.domain.turn import TurnStatus, Usage
from app.stores.redis.store import RedisStore
from tests.faultproxy import REFUSE, RESET, SWALLOW_REPLIES, FaultProxy
from tests.redisserver import RedisServer

from .builders import (
    BOOT,
    LIFE,
    T0,
    current,
    extend,
    failed,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    running,
    stored_session,
)
from .faulty_wire import FaultyWire

SOON_S = 1.5
RECOVERY_S = 3.0


@pytest.fixture(scope="module")
def own_server() -> Iterator[RedisServer]:
    """A server that these tests may freeze and kill."""
    server = RedisServer()
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
async def store(own_server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(own_server.url, LIFE, prefix=f"trouble-{uuid4().hex}")
    await store.open(BOOT)
    yield store
    await store.close()


@pytest.fixture
async def wire(redis_server: RedisServer) -> AsyncIterator[FaultyWire]:
    async with FaultyWire(redis_server.port).running() as wire:
        yield wire


@pytest.fixture
async def behind(wire: FaultyWire) -> AsyncIterator[RedisStore]:
    """A store behind the faulty wire."""
    store = RedisStore(wire.url, LIFE, prefix=f"trouble-{uuid4().hex}")
    await store.open(BOOT)
    yield store
    await store.close()


async def recovered(store: RedisStore) -> float:
    """Return after how many seconds the store answers again."""
    began = time.monotonic()
    while time.monotonic() - began < RECOVERY_S:
        try:
            await store.ping()
            return time.monotonic() - began
        except StoreUnavailable:
            continue
    raise AssertionError("it did not recover")


async def refused(call: Awaitable[object]) -> StoreUnavailable:
    """Return the error with which a call ends, which must be soon."""
    began = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        await call
    assert time.monotonic() - began < SOON_S
    return caught.value


async def test_a_frozen_server_is_unavailable_soon(own_server: RedisServer, store: RedisStore) -> None:
    """Reads and writes end within 1.5 s, also the second time; what may have happened says so."""
    session = await stored_session(store)
    turn = make_turn(session)
    own_server.freeze()
    try:
        lost, read = await asyncio.gather(
            refused(store.commit_turn(session, turn)), refused(store.find_session(session.key))
        )
        assert (lost.outcome_unknown, read.outcome_unknown) == (True, False)
        began = time.monotonic()
        await refused(store.ping())
        await refused(store.start_turn(session, running(turn)))
        assert time.monotonic() - began < SOON_S / 2  # who asks again in the same request
    finally:
        own_server.thaw()
    assert await recovered(store) < RECOVERY_S
    assert (await store.commit_turn(session, turn)).head == turn.turn_id
    assert (await store.list_turns(session, 9)).total == 1


async def test_those_who_wait_their_turn_fail_together(own_server: RedisServer, store: RedisStore) -> None:
    """Twenty patches of one session and of one shared state, frozen, all end within 1.5 s."""
    session = await stored_session(store)
    own_server.freeze()
    try:
        await asyncio.gather(
            *(refused(store.patch_state(session.key, {"n": n}, T0)) for n in range(20)),
            *(refused(store.patch_shared(SCOPE, {"n": n}, T0)) for n in range(20)),
        )
    finally:
        own_server.thaw()
    await recovered(store)
    assert (await store.patch_state(session.key, {"n": 1}, T0)).state == {"n": 1}


async def test_a_server_that_is_gone_comes_back(own_server: RedisServer, store: RedisStore) -> None:
    """While it is gone calls fail at once; once it is back they work, without a restart, nothing lost."""
    session, turns = await extend(store, await stored_session(store), 3)
    own_server.kill()
    try:
        for _ in range(3):
            await refused(store.find_session(session.key))
        await refused(store.commit_turn(session, make_turn(session)))
    finally:
        own_server.start()
    assert await recovered(store) < RECOVERY_S
    assert await store.find_session(session.key) == session
    assert (await store.load_path(session)).messages == tuple(m for turn in turns for m in turn.messages)
    await extend(store, session, 1)


async def test_close_ends_while_the_server_stands_still(own_server: RedisServer, store: RedisStore) -> None:
    """A close that is owed replies does not wait for ever."""
    session = await stored_session(store)
    own_server.freeze()
    try:
        call = asyncio.get_running_loop().create_task(store.touch_session(session.key, T0))
        await asyncio.sleep(0)
        async with asyncio.timeout(4):
            await store.close()
        assert isinstance(await asyncio.gather(call, return_exceptions=True), list)
    finally:
        own_server.thaw()


async def test_scripts_are_told_again(own_server: RedisServer, store: RedisStore) -> None:
    """A server that has forgotten all scripts is told them, in the midst of turns."""
    session = await stored_session(store)
    for _ in range(2):
        own_server.command("SCRIPT", "FLUSH")
        turn = make_turn(session)
        await store.start_turn(session, running(turn))
        own_server.command("SCRIPT", "FLUSH")
        session = await store.commit_turn(session, turn)
    assert session.depth == 2


Deed = Callable[[RedisStore, Session], Awaitable[object]]
SCOPE = StateScope("default")
DEEDS: dict[str, Deed] = {
    "create": lambda store, session: store.create_session(make_session("new")),
    "touch": lambda store, session: store.touch_session(session.key, T0 + 90_000),
    "update": lambda store, session: store.update_session(session.key, SessionChange(title="t"), T0),
    "patch": lambda store, session: store.patch_state(session.key, {"n": 1}, T0),
    "shared": lambda store, session: store.patch_shared(SCOPE, {"n": 1}, T0),
    "start": lambda store, session: store.start_turn(session, running(make_turn(session))),
    "commit": lambda store, session: store.commit_turn(session, make_turn(session)),
    "record": lambda store, session: store.record_turn(session, failed(make_turn(session))),
    "move": lambda store, session: store.move_head(session, Back(1), T0 + 90_000),
    "checkpoint": lambda store, session: store.add_checkpoint(session, make_checkpoint()),
    "note": lambda store, session: store.add_note(session, make_note(session.head or ""), Usage(5, 5)),
    "fork": lambda store, session: store.fork_session(session, None, make_session("fork")),
}


@pytest.mark.parametrize("swallowed_at", [0, 1])
@pytest.mark.parametrize("deed", DEEDS.values(), ids=DEEDS)
async def test_a_lost_reply_doubles_nothing(
    wire: FaultyWire, behind: RedisStore, deed: Deed, swallowed_at: int
) -> None:
    """Whichever reply is lost, the deed is done once, and the caller is told that it is done."""
    session, _ = await extend(behind, await stored_session(behind, user_id="u"), 2)
    began = await behind.get_usage("", "u", 9), await behind.get_session_stats()
    calls = 0
    call = behind._db.wire.call

    async def counted(*words: object, **options: object) -> object:
        nonlocal calls
        if calls == swallowed_at:
            wire.swallow = True
        calls += 1
        return await call(*words, **options)  # type: ignore[arg-type]

    behind._db.wire.call = counted  # type: ignore[method-assign, assignment]
    await deed(behind, session)
    behind._db.wire.call = call  # type: ignore[method-assign]
    wire.swallow = False
    after = await current(behind, session)
    entries = await behind.list_entries(session, None, 99, newest_first=False)
    assert wire.swallowed == (1 if calls > swallowed_at else 0)
    assert len(entries) - 2 <= 1
    assert after.rev - session.rev <= 1
    assert after.state_rev - session.state_rev <= 1
    assert (await behind.get_shared(SCOPE)).rev <= 1
    usage, stats = await behind.get_usage("", "u", 9), await behind.get_session_stats()
    assert usage.turns - began[0].turns == stats.turns - began[1].turns <= 1
    assert stats.created - began[1].created == stats.total - began[1].total <= 1


@pytest.mark.parametrize("kind", ["session", "shared"])
async def test_a_lost_reply_behind_which_others_wrote_is_unknown(
    wire: FaultyWire, behind: RedisStore, redis_server: RedisServer, kind: str
) -> None:
    """A patch whose reply was lost, and over which another process has written, is not patched again."""
    other = RedisStore(redis_server.url, LIFE, prefix=behind._prefix)
    await other.open("other")
    session = await stored_session(behind)
    tell = behind._db.tell

    async def lose(*words: object, **options: object) -> object:
        wire.swallow = True
        return await tell(*words, **options)  # type: ignore[arg-type]

    behind._db.tell = lose  # type: ignore[method-assign, assignment]
    if kind == "session":
        wire.meanwhile = lambda: other.patch_state(session.key, {"b": 1}, T0)
        call: Awaitable[object] = behind.patch_state(session.key, {"a": 1}, T0)
    else:
        wire.meanwhile = lambda: other.patch_shared(SCOPE, {"b": 1}, T0)
        call = behind.patch_shared(SCOPE, {"a": 1}, T0)
    assert (await refused(call)).outcome_unknown
    behind._db.tell = tell  # type: ignore[method-assign]
    both = {"a": 1, "b": 1}
    if kind == "session":
        assert (await current(other, session)).state == both
        assert len(await other.list_entries(session, None, 9, newest_first=False)) == 2
    else:
        assert await other.get_shared(SCOPE) == SharedState(both, 2)
    await other.close()


async def test_a_cut_connection_costs_nobody_anything(wire: FaultyWire, behind: RedisStore) -> None:
    """Whatever was under way when the connection ended is done, once, on the next one."""
    sessions = [await stored_session(behind, f"s{number}") for number in range(30)]
    turns = [make_turn(session) for session in sessions]
    loop = asyncio.get_running_loop()
    calls = [
        loop.create_task(behind.commit_turn(session, turn))
        for session, turn in zip(sessions, turns, strict=True)
    ]
    await asyncio.sleep(0)
    wire.cut()
    committed = await asyncio.gather(*calls)
    assert [session.head for session in committed] == [turn.turn_id for turn in turns]
    assert (await behind.get_session_stats()).turns == 30


async def test_a_cancelled_call_leaves_nothing_unread(store: RedisStore) -> None:
    """After hundreds of callers that left at any moment each reply still goes to whom it belongs."""
    sessions = [await stored_session(store, f"s{number}") for number in range(20)]
    loop = asyncio.get_running_loop()
    for round_ in range(20):
        calls = [loop.create_task(store.find_session(session.key)) for session in sessions]
        for _ in range(round_ % 5):
            await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        found = await asyncio.gather(*calls, return_exceptions=True)
        for session, result in zip(sessions, found, strict=True):
            assert result == session or isinstance(result, asyncio.CancelledError)


@pytest.mark.parametrize("steps", range(8))
async def test_a_cancelled_write_happens_or_not(store: RedisStore, steps: int) -> None:
    """Cancelled after any number of steps, a change of several round trips is whole or not at all."""
    session, turns = await extend(store, await stored_session(store), 3)
    call = asyncio.get_running_loop().create_task(store.move_head(session, Back(1), T0 + 90_000))
    for _ in range(steps):
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await store.ping()
    after = await current(store, session)
    entries = await store.list_entries(session, None, 99, newest_first=False)
    is_done = after.head == turns[1].turn_id
    assert is_done or after == session
    assert len(entries) == 3 + is_done


async def test_a_writer_that_waits_and_goes_lets_the_next_in(store: RedisStore) -> None:
    """Of a hundred patches of one session, every second cancelled, the others are all there."""
    session = await stored_session(store)
    loop = asyncio.get_running_loop()
    calls = [loop.create_task(store.patch_state(session.key, {f"k{n}": n}, T0)) for n in range(100)]
    await asyncio.sleep(0)
    for call in calls[1::2]:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    state = (await current(store, session)).state
    assert state == {f"k{n}": n for n in range(0, 100, 2)}


async def test_two_stores_patch_the_same(redis_server: RedisServer) -> None:
    """Two processes that patch one session and one shared state at once lose nothing."""
    prefix = f"trouble-{uuid4().hex}"
    stores = [RedisStore(redis_server.url, LIFE, prefix=prefix) for _ in range(2)]
    for number, store in enumerate(stores):
        await store.open(f"boot-{number}")
    session = await stored_session(stores[0])
    await asyncio.gather(
        *(stores[n % 2].patch_state(session.key, {f"k{n}": n}, T0) for n in range(60)),
        *(stores[n % 2].patch_shared(SCOPE, {f"k{n}": n}, T0) for n in range(60)),
    )
    after = await current(stores[0], session)
    assert (after.state, after.state_rev) == ({f"k{n}": n for n in range(60)}, 60)
    assert await stores[1].get_shared(SCOPE) == SharedState({f"k{n}": n for n in range(60)}, 60)
    for store in stores:
        await store.close()


async def test_a_turn_goes_on_over_what_others_changed(redis_server: RedisServer) -> None:
    """A commit whose session another process has retitled keeps the title, and is counted once."""
    prefix = f"trouble-{uuid4().hex}"
    here = RedisStore(redis_server.url, LIFE, prefix=prefix)
    there = RedisStore(redis_server.url, LIFE, prefix=prefix)
    await here.open("here")
    await there.open("there")
    session = await stored_session(here, user_id="u")
    turn = make_turn(session)
    await here.start_turn(session, running(turn))
    await there.update_session(SessionKey("", "s1"), SessionChange(title="theirs"), T0)
    after = await here.commit_turn(session, turn)
    assert (after.title, after.head) == ("theirs", turn.turn_id)
    shown = await there.get_turn(after, turn.turn_id)
    assert shown == replace(turn, on_branch=True)
    assert shown.status is TurnStatus.FINISHED
    usage = await there.get_usage("", "u", 9)
    assert usage == UserUsage(1, 21, 6, usage.days)
    await here.close()
    await there.close()


async def test_a_write_whose_reply_was_lost_is_in_doubt_though_nobody_listens_any_more(
    own_server: RedisServer,
) -> None:
    """A commit that was carried out is not called failed because its repeat cannot even connect."""
    prefix = f"trouble-{uuid4().hex}"
    with FaultProxy(own_server.port) as proxy:
        store = RedisStore(f"redis://127.0.0.1:{proxy.port}/0", LIFE, prefix=prefix)
        beside = RedisStore(own_server.url, LIFE, prefix=prefix)
        await store.open(BOOT)
        await beside.open("boot-2")
        session = await stored_session(store)
        proxy.inflict(SWALLOW_REPLIES)
        call = asyncio.get_running_loop().create_task(store.commit_turn(session, make_turn(session)))
        async with asyncio.timeout(SOON_S):
            while (await current(beside, session)).head is None:  # noqa: ASYNC110
                await asyncio.sleep(0)
        proxy.inflict(REFUSE)
        error = await refused(call)
        assert error.outcome_unknown
        await store.close()
        await beside.close()


def test_a_connection_that_is_reset_at_once_is_a_store_that_is_away(own_server: RedisServer) -> None:
    """On the server's own event loop, too, which tells it in its own way."""

    async def scene() -> None:
        with FaultProxy(own_server.port) as proxy:
            store = RedisStore(f"redis://127.0.0.1:{proxy.port}/0", LIFE, prefix=f"trouble-{uuid4().hex}")
            await store.open(BOOT)
            proxy.inflict(RESET)
            for _ in range(50):
                await refused(store.touch_session(SessionKey("", "s"), T0))
            proxy.heal()
            assert await recovered(store) < RECOVERY_S
            await store.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())
