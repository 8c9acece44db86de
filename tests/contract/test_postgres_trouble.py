"""What becomes of calls while the PostgreSQL server is frozen, gone, or back."""

import asyncio
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import asyncpg
import pytest

from app.domain.errors import HeadMoved, StoreUnavailable
from app.domain.session import Session
from app.stores.postgres import PostgresStore
from app.stores.postgres.leases import TRUST_S
from app.stores.postgres.link import POOL_SIZE, _Progress
from tests.postgresserver import PostgresServer, find_binaries

from .builders import (
    BOOT,
    LIFE,
    current,
    extend,
    failed,
    make_checkpoint,
    make_session,
    make_turn,
    running,
    stored_session,
)
from .checks import until_awaited
from .faulty_wire import FaultyWire

PATIENCE_S = 1.5
RECOVERY_S = 3.0


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A server for the tests that harm it; each leaves it running."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("there is no PostgreSQL here")
    with PostgresServer(binaries) as server:
        yield server


@pytest.fixture
async def store(own_server: PostgresServer) -> AsyncIterator[PostgresStore]:
    with own_server.empty_schema() as url:
        store = PostgresStore(url, LIFE, accept_volatile=True)
        await store.open(BOOT)
        yield store
        await store.close()


def url_of(store: PostgresStore) -> str:
    assert isinstance(store._link._target, str)
    return store._link._target


async def refused(call: Awaitable[object]) -> StoreUnavailable:
    """Assert that the call fails in time and return how."""
    started = asyncio.get_running_loop().time()
    with pytest.raises(StoreUnavailable) as caught:
        await call
    assert asyncio.get_running_loop().time() - started < PATIENCE_S
    return caught.value


async def recovered(work: Callable[[], Awaitable[object]]) -> None:
    """Return when ``work`` succeeds; it must do so in time."""
    async with asyncio.timeout(RECOVERY_S):
        while True:
            try:
                await work()
            except StoreUnavailable:
                continue
            return


async def warm_up(store: PostgresStore, session: Session) -> Session:
    """Let every connection of the pool be made."""
    await asyncio.gather(*(store.find_session(session.key) for _ in range(2 * POOL_SIZE)))
    session, _ = await extend(store, session, 2)
    return session


async def test_a_frozen_server_is_given_up_in_time(store: PostgresStore, own_server: PostgresServer) -> None:
    """Every kind of call fails in time and says what is known of it; then all is as acknowledged."""
    session = await warm_up(store, await stored_session(store, user_id="u"))
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    own_server.freeze()
    try:
        key = session.key
        reads = [store.find_session(key), store.load_path(session), store.ping(), store.leases.nodes()]
        for error in await asyncio.gather(*map(refused, reads)):
            assert not error.outcome_unknown
        steps = [store.commit_turn(session, turn), store.leases.renew([(key, turn.turn_id)])]
        for error in await asyncio.gather(*map(refused, steps)):
            assert error.outcome_unknown
        # A transaction that was not ended is undone.
        undone = [store.add_checkpoint(session, make_checkpoint()), store.create_session(make_session("new"))]
        for error in await asyncio.gather(*map(refused, undone)):
            assert not error.outcome_unknown
        await asyncio.gather(*(refused(store.find_session(session.key)) for _ in range(3 * POOL_SIZE)))
    finally:
        own_server.thaw()
    await recovered(lambda: store.commit_turn(session, turn))
    after = await current(store, session)
    assert (after.head, after.depth) == (turn.turn_id, 3)
    assert (await store.get_usage("", "u", 1)).turns == 3
    assert (await store.list_checkpoints(after, 9)).total == 0
    assert store.session_count_nowait() == (await store.get_session_stats()).total == 1
    session, _ = await extend(store, after, 2)
    assert session.depth == 5


async def test_many_calls_to_a_frozen_server_fail_together(
    store: PostgresStore, own_server: PostgresServer
) -> None:
    """Two hundred commits at once fail in the time of one, and can be repeated when it is back."""
    sessions = [await stored_session(store, f"s{number}") for number in range(200)]
    turns = [make_turn(session) for session in sessions]
    commits = [partial(store.commit_turn, s, t) for s, t in zip(sessions, turns, strict=True)]
    own_server.freeze()
    try:
        await asyncio.gather(*(refused(commit()) for commit in commits))
    finally:
        own_server.thaw()
    for commit in commits:
        await recovered(commit)
    assert (await store.get_session_stats()).turns == 200


async def test_what_a_request_asks_in_turn_fails_in_the_time_of_one(
    store: PostgresStore, own_server: PostgresServer
) -> None:
    """After one call without an answer the next ones give up sooner, until there is an answer again."""
    session = await warm_up(store, await stored_session(store))
    own_server.freeze()
    started = asyncio.get_running_loop().time()
    try:
        await refused(store.find_session(session.key))
        await refused(store.record_turn(session, failed(make_turn(session))))
        assert asyncio.get_running_loop().time() - started < PATIENCE_S
    finally:
        own_server.thaw()
    await recovered(store.ping)
    assert not store._link._is_silent


async def test_calls_are_hurried_no_longer_than_connecting_takes(own_server: PostgresServer) -> None:
    """Where connecting takes longer than a hurried call may, calls get all their time back all the same."""
    with own_server.empty_schema() as url:
        async with FaultyWire(own_server.port).running() as wire:
            store = PostgresStore(
                url.replace(f":{own_server.port}/", f":{wire.port}/"), LIFE, accept_volatile=True
            )
            await store.open(BOOT)
            session = await stored_session(store)
            wire.gate.clear()
            wire.cut()
            for _ in range(3):
                await refused(store.find_session(session.key))
            assert store._link._is_silent
            wire.gate.set()
            async with asyncio.timeout(PATIENCE_S):
                while store._link._is_silent:
                    await store._link._probing  # type: ignore[misc]
            assert await store.find_session(session.key) == session
            await store.close()


async def test_who_waits_for_the_own_pool_does_not_call_the_server_silent(store: PostgresStore) -> None:
    """A call that got no connection because others have them all says nothing of the server."""
    gate, held = asyncio.Event(), asyncio.Barrier(POOL_SIZE + 1)

    async def work(connection: Any) -> None:
        await held.wait()
        await gate.wait()

    loop = asyncio.get_running_loop()
    holding = [loop.create_task(store._link.transact(work, limit_s=10)) for _ in range(POOL_SIZE)]
    await held.wait()
    await refused(store.find_session(make_session().key))
    assert not store._link._is_silent
    gate.set()
    await asyncio.gather(*holding)
    await store.ping()


async def test_who_waits_for_a_session_waits_no_longer_where_nothing_answers(
    store: PostgresStore, own_server: PostgresServer
) -> None:
    """A dozen who wait for a frozen server end all at their limit, not one after the other."""
    session = await stored_session(store)
    await store.leases.take(session.key, "a hold")
    loop = asyncio.get_running_loop()
    own_server.freeze()
    try:
        began = loop.time()
        waits = (store.leases.wait_free(session.key, 0.1) for _ in range(12))
        await asyncio.gather(*waits, return_exceptions=True)
        assert loop.time() - began < 0.5
        began = loop.time()
        waits = (store.leases.wait_free(session.key, 20.0) for _ in range(12))
        ends = await asyncio.gather(*waits, return_exceptions=True)
        assert loop.time() - began < 2 * PATIENCE_S
    finally:
        own_server.thaw()
    assert all(isinstance(end, StoreUnavailable) for end in ends)


async def test_a_listening_connection_that_died_in_silence_is_noticed(
    store: PostgresStore, own_server: PostgresServer
) -> None:
    """Who waits on a connection that nothing comes over any more looks by himself, and gets another one."""
    session = await stored_session(store)
    await store.leases.take(session.key, "a hold")
    await store.leases.wait_free(session.key, 0.1)  # from now on it listens
    await store.leases.give_back(session.key, "a hold")
    await store.leases.take(session.key, "a hold")
    connection = await asyncpg.connect(own_server.url)
    listening = await connection.fetchval("SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
    os.kill(listening, signal.SIGSTOP)
    try:
        waiting = asyncio.get_running_loop().create_task(store.leases.wait_free(session.key, 20.0))
        await until_awaited(url_of(store))
        await store.leases.give_back(session.key, "a hold")
        async with asyncio.timeout(TRUST_S + PATIENCE_S):
            await waiting
    finally:
        os.kill(listening, signal.SIGCONT)
    assert await connection.fetchval(
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND pid <> $1", listening
    )
    await connection.close()


async def test_a_frozen_server_does_not_keep_a_store_from_closing(
    store: PostgresStore, own_server: PostgresServer
) -> None:
    """Closing gives up in time; its leases then run out by themselves."""
    await warm_up(store, await stored_session(store))
    own_server.freeze()
    try:
        async with asyncio.timeout(2 * PATIENCE_S + 1):
            await store.close()
    finally:
        own_server.thaw()
    await recovered(partial(store.open, BOOT))
    assert store.session_count_nowait() == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
async def test_a_server_that_went_and_came_back_is_used_again(
    store: PostgresStore, own_server: PostgresServer, how: signal.Signals
) -> None:
    """While it is gone calls fail at once; when it is back everything acknowledged is there."""
    session = await warm_up(store, await stored_session(store))
    own_server.stop(how)
    try:
        await refused(store.find_session(session.key))
        await refused(store.commit_turn(session, make_turn(session)))
        await refused(store.ping())
    finally:
        own_server.start()
    await recovered(store.ping)
    assert await store.find_session(session.key) == session
    turn = make_turn(session)
    assert (await store.commit_turn(session, turn)).head == turn.turn_id


async def test_connections_that_the_server_ended_are_replaced_unnoticed(
    store: PostgresStore, own_server: PostgresServer
) -> None:
    """After every idle connection was ended by the server, reads and turns go on without an error."""
    session = await warm_up(store, await stored_session(store))
    for _ in range(3):
        own_server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'agentpool'"
        )
        assert await store.find_session(session.key) == session
        session, _ = await extend(store, session, 1)
    assert session.depth == 5


async def test_a_cancelled_call_to_a_frozen_server_ends_at_once(
    store: PostgresStore, own_server: PostgresServer
) -> None:
    """Who is cancelled does not wait for the server, and the pool is whole afterwards."""
    session = await warm_up(store, await stored_session(store))
    loop = asyncio.get_running_loop()
    own_server.freeze()
    try:
        calls = [loop.create_task(store.load_path(session)) for _ in range(POOL_SIZE)]
        calls.append(loop.create_task(store.record_turn(session, failed(make_turn(session)))))
        await asyncio.wait(calls, timeout=0.2)
        for call in calls:
            call.cancel()
        async with asyncio.timeout(0.5):
            ends = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        own_server.thaw()
    assert all(isinstance(end, asyncio.CancelledError) for end in ends)
    await recovered(store.ping)
    async with asyncio.timeout(RECOVERY_S):
        await asyncio.gather(*(store.load_path(session) for _ in range(3 * POOL_SIZE)))


async def test_who_waits_for_a_session_hears_when_the_server_is_gone(
    store: PostgresStore, own_server: PostgresServer
) -> None:
    """A waiter ends soon, and waits again when the server is back."""
    session = await warm_up(store, await stored_session(store))
    turn = make_turn(session)
    await store.start_turn(session, running(turn))
    waiting = asyncio.get_running_loop().create_task(store.leases.wait_free(session.key, 20))
    await until_awaited(url_of(store))
    own_server.stop(signal.SIGQUIT)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(waiting, return_exceptions=True)
    finally:
        own_server.start()
    # A crash of the server may lose a start record, and its lease with it.
    await recovered(lambda: store.start_turn(session, running(turn)))
    waiting = asyncio.get_running_loop().create_task(store.leases.wait_free(session.key, 20))
    await until_awaited(url_of(store))
    await recovered(partial(store.commit_turn, session, turn))
    async with asyncio.timeout(5):
        await waiting
    assert await store.leases.holder(session.key) is None


async def test_an_answer_that_comes_too_late_for_its_caller_is_in_doubt(store: PostgresStore) -> None:
    """A write that is carried out while its time runs out, as in a paused process, is not called failed."""

    async def work(connection: Any) -> None:
        await connection.execute("CREATE TABLE done (number int)")
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            pass  # nothing else runs

    with pytest.raises(StoreUnavailable) as caught:
        await store._link._start(work, _Progress(writes=True), repeats=False, limit_s=0.05)
    assert caught.value.outcome_unknown
    assert await store._link.run(lambda connection: connection.fetchval("SELECT count(*) FROM done")) == 0


async def test_a_write_that_was_lost_is_in_doubt_whatever_its_repeat_says(store: PostgresStore) -> None:
    """A first try without an answer may have been carried out, though the server refuses the second."""
    errors = iter([asyncpg.ConnectionDoesNotExistError("gone"), asyncpg.QueryCanceledError("slow")])

    async def work(connection: Any) -> None:
        raise next(errors)

    with pytest.raises(StoreUnavailable) as caught:
        await store._link.run(work, writes=True)
    assert caught.value.outcome_unknown


@pytest.mark.parametrize(("error", "is_logged"), [(HeadMoved(), False), (KeyError("ours"), True)])
async def test_nobody_complains_of_a_refusal_that_nobody_waits_for(
    store: PostgresStore, caplog: pytest.LogCaptureFixture, error: Exception, is_logged: bool
) -> None:
    """A write whose caller is gone is refused without a word in the log; a mistake of ours is told."""
    began, goes_on = asyncio.Event(), asyncio.Event()

    async def refuse(_: Any) -> None:
        began.set()
        await goes_on.wait()
        raise error

    caller = asyncio.create_task(store._link.run(refuse, writes=True))
    await began.wait()
    caller.cancel()
    await asyncio.wait([caller])
    goes_on.set()
    await asyncio.wait(list(store._link._writes))
    gc.collect()
    told = [one.message for one in caplog.records if one.exc_info and one.exc_info[1] is error]
    assert told == ["a write that nobody waits for failed"] * is_logged
