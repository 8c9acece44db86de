"""Leases in Redis, as two stores of one server see them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest

from app.domain.errors import (
    HeadMoved,
    KeyTaken,
    LeasedElsewhere,
    SessionNotFound,
    SnapshotUnreadable,
    StoreUnavailable,
    TurnNotFound,
)
from app.domain.idempotency import Binding
from app.domain.ids import SessionKey
from app.domain.lease import Holder, Node
from app.domain.session import Session, SessionChange
from app.domain.turn import TurnStatus
from app.stores.redis import keys
from app.stores.redis.store import RedisStore
from tests.redisserver import RedisServer

from .builders import LIFE, T0, current, extend, failed, make_turn, running, stored_session

SOON_S = 1.0
BINDING = Binding("", "key", b"f" * 16)


class Pair:
    """Two stores on the same content, and a hand on the server's clock of leases."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self.prefix = f"leases-{uuid4().hex}"
        self.a = RedisStore(server.url, LIFE, prefix=self.prefix)
        self.b = RedisStore(server.url, LIFE, prefix=self.prefix)

    def lapse(self, session: Session) -> None:
        """Let the session's lease have run out."""
        tag = keys.tag_of(session.key)
        self._server.command("HSET", f"{self.prefix}:{{{tag}}}:l", "x", "1")
        self._server.command("ZADD", f"{self.prefix}:leases", "1", tag)


@pytest.fixture
async def pair(redis_server: RedisServer) -> AsyncIterator[Pair]:
    pair = Pair(redis_server)
    await pair.a.open("a", "http://a:1")
    await pair.b.open("b", None)
    yield pair
    await pair.a.close()
    await pair.b.close()


async def test_one_store_at_a_time_has_a_session(pair: Pair) -> None:
    """The other is told who has it, and takes it once it is given back."""
    session = await stored_session(pair.a)
    turn, theirs = make_turn(session), make_turn(session)
    assert await pair.a.start_turn(session, running(turn)) is None
    for call in (
        lambda: pair.b.start_turn(session, running(theirs)),
        lambda: pair.b.leases.take(session.key, "n"),
    ):
        with pytest.raises(LeasedElsewhere) as caught:
            await call()
        assert caught.value.holder == Holder(Node("a", "http://a:1"), turn.turn_id, is_turn=True)
    session = await pair.a.commit_turn(session, turn)
    assert await pair.b.leases.holder(session.key) is None
    await pair.b.leases.take(session.key, "n")
    assert await pair.a.leases.holder(session.key) == Holder(Node("b"), "n", is_turn=False)


async def test_who_knows_an_old_session_is_told_the_new_one(pair: Pair) -> None:
    """The start of a turn takes the lease, notes nothing, and returns the session as it is."""
    old = await stored_session(pair.a)
    await pair.b.find_session(old.key)
    new, _ = await extend(pair.b, old, 2)
    turn = make_turn(old)
    assert await pair.a.start_turn(old, running(turn)) == new
    holder = await pair.b.leases.holder(old.key)
    assert holder is not None
    assert holder.turn_id == turn.turn_id
    with pytest.raises(TurnNotFound):
        await pair.a.get_turn(new, turn.turn_id)
    turn = make_turn(new, turn_id=turn.turn_id)
    assert await pair.a.start_turn(new, running(turn)) is None
    assert (await pair.a.commit_turn(new, turn)).depth == 3


async def test_a_touch_elsewhere_is_no_other_session(pair: Pair) -> None:
    """What changes no revision does not keep a turn from beginning."""
    session = await stored_session(pair.a)
    await pair.b.touch_session(session.key, T0 + 50)
    turn = make_turn(session)
    assert await pair.a.start_turn(session, running(turn)) is None
    assert (await pair.a.get_turn(session, turn.turn_id)).status is TurnStatus.RUNNING
    await pair.b.update_session(session.key, SessionChange(title="t"), T0)
    other = make_turn(session)
    with pytest.raises(LeasedElsewhere):
        await pair.b.start_turn(session, running(other))


def between_starts(store: RedisStore, deed: Callable[[], Awaitable[object]]) -> None:
    """Let ``deed`` be done when the store has sent a start of a turn and has to send it again."""
    tell, sent = store._db.tell, []

    async def told(script: str, *words: Any, **options: Any) -> Any:
        if script == "start":
            sent.append(words)
            if len(sent) == 2:
                await deed()
        return await tell(script, *words, **options)

    store._db.tell = told  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["runs", "is committed"])
async def test_a_start_that_has_the_session_but_not_the_key_gives_it_back(pair: Pair, how: str) -> None:
    """A key that another turn takes between the two halves of a start leaves the session free."""
    session, other = await stored_session(pair.a), await stored_session(pair.b, "s2")
    await pair.b.touch_session(session.key, T0 + 50)
    theirs = make_turn(other, binding=BINDING)

    async def take_key() -> None:
        assert await pair.b.leases.holder(session.key) is not None
        await pair.b.start_turn(other, running(theirs))
        if how == "is committed":
            await pair.b.commit_turn(other, theirs)

    between_starts(pair.a, take_key)
    with pytest.raises(KeyTaken) as caught:
        await pair.a.start_turn(session, running(make_turn(session, binding=BINDING)))
    assert caught.value.turn_id == theirs.turn_id
    assert await pair.b.leases.holder(session.key) is None
    assert await pair.b.start_turn(await current(pair.b, session), running(make_turn(session))) is None


async def test_who_was_told_the_new_session_and_finds_the_key_taken_has_no_lease(pair: Pair) -> None:
    """The lease that came with the new session goes with the refusal of the start that follows."""
    old, other = await stored_session(pair.a), await stored_session(pair.b, "s2")
    await pair.b.find_session(old.key)
    new, _ = await extend(pair.b, old, 1)
    turn = make_turn(old, binding=BINDING)
    assert await pair.a.start_turn(old, running(turn)) == new
    await pair.b.start_turn(other, running(make_turn(other, binding=BINDING)))
    with pytest.raises(KeyTaken):
        await pair.a.start_turn(new, running(make_turn(new, turn_id=turn.turn_id, binding=BINDING)))
    assert await pair.b.leases.holder(new.key) is None


async def test_a_start_that_fails_half_way_gives_the_session_back(pair: Pair) -> None:
    """If the second half does not come through, the session is free, and no start is noted."""
    session = await stored_session(pair.a)
    await pair.b.touch_session(session.key, T0 + 50)

    async def fail() -> None:
        raise StoreUnavailable("Redis cannot be reached.")

    between_starts(pair.a, fail)
    with pytest.raises(StoreUnavailable) as caught:
        await pair.a.start_turn(session, running(make_turn(session)))
    assert not caught.value.outcome_unknown
    assert await pair.b.leases.holder(session.key) is None
    assert await pair.b.list_entries(session, None, 9, newest_first=False) == ()


async def test_a_start_whose_lease_cannot_be_given_back_is_in_doubt(pair: Pair) -> None:
    """The caller is told so, that it may end what may have begun."""
    session = await stored_session(pair.a)
    await pair.b.touch_session(session.key, T0 + 50)

    async def go() -> None:
        await pair.a._db.wire.close()

    between_starts(pair.a, go)
    with pytest.raises(StoreUnavailable) as caught:
        await pair.a.start_turn(session, running(make_turn(session)))
    assert caught.value.outcome_unknown
    assert await pair.b.leases.holder(session.key) is not None


async def test_a_start_that_finds_a_broken_session_gives_it_back(
    pair: Pair, redis_server: RedisServer
) -> None:
    """A record that has become unreadable is no reason to keep others from repairing or deleting it."""
    session = await stored_session(pair.a)
    await pair.b.touch_session(session.key, T0 + 50)
    redis_server.command("HSET", f"{pair.prefix}:{{{keys.tag_of(session.key)}}}:s", "r", "rubbish")
    with pytest.raises(SnapshotUnreadable):
        await pair.a.start_turn(session, running(make_turn(session)))
    assert await pair.b.leases.holder(session.key) is None


async def test_a_lapsed_turn_is_ended_by_whoever_takes_the_session(pair: Pair) -> None:
    """In the same step it is failed, counted and its key free; its own commit comes too late."""
    session = await stored_session(pair.a, user_id="u")
    lost = make_turn(session, binding=BINDING)
    await pair.a.start_turn(session, running(lost))
    pair.lapse(session)
    session = await current(pair.b, session)
    turn = make_turn(session, binding=BINDING)
    assert await pair.b.start_turn(session, running(turn)) is None
    shown = await pair.a.get_turn(session, lost.turn_id)
    assert (shown.status, shown.error and shown.error.code, shown.last_seq) == (
        TurnStatus.FAILED,
        "INTERRUPTED",
        2,
    )
    with pytest.raises(HeadMoved):
        await pair.a.commit_turn(session, lost)
    after = await pair.b.commit_turn(session, turn)
    assert after.head == turn.turn_id
    found = await pair.a.find_bound("", "key")
    assert found is not None
    assert found.turn.turn_id == turn.turn_id
    assert (await pair.a.get_usage("", "u", 9)).turns == 2
    assert (await pair.a.get_session_stats()).turns_failed == 1


async def test_a_lapsed_lease_that_nobody_took_still_commits(pair: Pair) -> None:
    """Running out alone loses nothing, whether it is renewed or not."""
    session = await stored_session(pair.a)
    turn = make_turn(session)
    await pair.a.start_turn(session, running(turn))
    pair.lapse(session)
    assert await pair.a.leases.renew([(session.key, turn.turn_id), (session.key, "other")]) == (True, False)
    assert await pair.b.leases.holder(session.key) is not None
    pair.lapse(session)
    assert (await pair.a.commit_turn(session, turn)).head == turn.turn_id


async def test_what_was_reaped_is_lost(pair: Pair) -> None:
    """A reaped turn is failed, counted once, and its lease cannot be renewed."""
    sessions = [await stored_session(pair.a, f"s{n}") for n in range(3)]
    turns = [make_turn(session) for session in sessions]
    for session, turn in zip(sessions, turns, strict=True):
        await pair.a.start_turn(session, running(turn))
        pair.lapse(session)
    await pair.a.leases.take(SessionKey("", "nothing there"), "n")
    assert await pair.b.leases.reap(2) == 2
    assert await pair.b.leases.reap(9) == 1
    assert await pair.b.leases.reap(9) == 0
    held = [(session.key, turn.turn_id) for session, turn in zip(sessions, turns, strict=True)]
    assert await pair.a.leases.renew(held) == (False,) * 3
    assert (await pair.b.get_session_stats()).turns_failed == 3
    with pytest.raises(HeadMoved):
        await pair.a.start_turn(await current(pair.a, sessions[0]), running(turns[0]))
    assert await pair.a.leases.holder(sessions[0].key) is None


async def test_a_start_that_is_given_back_never_was(pair: Pair) -> None:
    """Its record and its key are gone; given back by a stranger, nothing happens."""
    session = await stored_session(pair.a)
    turn = make_turn(session, binding=BINDING)
    await pair.a.start_turn(session, running(turn))
    await pair.b.leases.give_back(session.key, "stranger")
    assert await pair.b.leases.holder(session.key) is not None
    await pair.a.leases.give_back(session.key, turn.turn_id)
    assert await pair.b.leases.holder(session.key) is None
    assert await pair.b.list_entries(session, None, 9, newest_first=False) == ()
    session = await current(pair.b, session)
    assert await pair.b.start_turn(session, running(make_turn(session, binding=BINDING))) is None


async def test_a_key_belongs_to_one_turn_at_a_time(pair: Pair) -> None:
    """While that runs the others are told who has it; once it is committed, that it is."""
    session, other = await stored_session(pair.a), await stored_session(pair.b, "s2")
    first, second = make_turn(session, binding=BINDING), make_turn(other, binding=BINDING)
    await pair.a.start_turn(session, running(first))
    with pytest.raises(KeyTaken) as caught:
        await pair.b.start_turn(other, running(second))
    assert caught.value.holder == Holder(Node("a", "http://a:1"), first.turn_id, is_turn=True)
    assert caught.value.session_id == "s1"
    assert await pair.b.leases.holder(other.key) is None
    await pair.a.commit_turn(session, first)
    with pytest.raises(KeyTaken) as caught:
        await pair.b.start_turn(other, running(second))
    assert (caught.value.holder, caught.value.turn_id) == (None, first.turn_id)


async def test_a_lapsed_turn_does_not_keep_its_key(pair: Pair) -> None:
    """A turn of another session that has the key, and whose lease ran out, is ended by who needs the key."""
    session, other = await stored_session(pair.a), await stored_session(pair.b, "s2")
    lost, turn = make_turn(session, binding=BINDING), make_turn(other, binding=BINDING)
    await pair.a.start_turn(session, running(lost))
    pair.lapse(session)
    assert await pair.b.start_turn(other, running(turn)) is None
    assert (await pair.b.get_turn(session, lost.turn_id)).status is TurnStatus.FAILED


async def test_a_deleted_session_has_no_lease(pair: Pair) -> None:
    """The lease goes with it, and a turn cannot begin in it."""
    session = await stored_session(pair.a)
    turn = make_turn(session)
    await pair.a.start_turn(session, running(turn))
    await pair.b.delete_session(session.key)
    assert await pair.b.leases.holder(session.key) is None
    assert await pair.a.leases.renew([(session.key, turn.turn_id)]) == (False,)
    for call in (pair.a.start_turn(session, running(turn)), pair.a.commit_turn(session, turn)):
        with pytest.raises(SessionNotFound):
            await call


@pytest.mark.parametrize("end", ["commit", "record", "give back", "delete", "reap"])
async def test_who_waits_is_woken(pair: Pair, end: str) -> None:
    """However a session comes free on one store, who waits on the other knows within a moment."""
    session = await stored_session(pair.a)
    turn = make_turn(session)
    await pair.a.start_turn(session, running(turn))
    waiter = asyncio.get_running_loop().create_task(pair.b.leases.wait_free(session.key, 30))
    await until_subscribed(pair.b)
    began = time.monotonic()
    match end:
        case "commit":
            await pair.a.commit_turn(session, turn)
        case "record":
            await pair.a.record_turn(session, failed(turn))
        case "give back":
            await pair.a.leases.give_back(session.key, turn.turn_id)
        case "delete":
            await pair.a.delete_session(session.key)
        case "reap":
            pair.lapse(session)
            await pair.a.leases.reap(9)
    async with asyncio.timeout(10):
        await waiter
    assert time.monotonic() - began < SOON_S
    assert await pair.b.leases.holder(session.key) is None


async def until_subscribed(store: RedisStore) -> None:
    """Return when the store's wake-ups listen to something."""
    wakeups = store._held.wakeups
    assert wakeups is not None
    async with asyncio.timeout(10):
        while not wakeups._subscribed:
            await store.ping()


async def test_nobody_waits_for_what_is_free_or_beyond_the_limit(pair: Pair) -> None:
    """A free session is waited for no time, a held one as long as is asked for at the most."""
    session = await stored_session(pair.a)
    began = time.monotonic()
    await pair.b.leases.wait_free(session.key, 30)
    await pair.a.leases.take(session.key, "n")
    await pair.b.leases.wait_free(session.key, 0.05)
    assert time.monotonic() - began < SOON_S
    waiter = asyncio.get_running_loop().create_task(pair.b.leases.wait_free(session.key, 30))
    await until_subscribed(pair.b)
    waiter.cancel()
    assert isinstance((await asyncio.gather(waiter, return_exceptions=True))[0], asyncio.CancelledError)
    assert pair.b._held.wakeups is not None
    assert pair.b._held.wakeups._calls == {}


async def test_nodes_know_each_other(pair: Pair) -> None:
    """Who has announced itself is listed with its address, and all share one secret."""
    assert await pair.a.leases.nodes() == ()
    await asyncio.gather(pair.a.leases.announce(), pair.b.leases.announce())
    await pair.a.leases.announce()
    assert await pair.b.leases.nodes() == (Node("a", "http://a:1"), Node("b", None))
    secrets = await asyncio.gather(*(store.leases.secret() for store in (pair.a, pair.b) * 5))
    assert len(set(secrets)) == 1
    assert len(secrets[0]) > 40


async def test_wake_ups_come_back_by_themselves(pair: Pair, redis_server: RedisServer) -> None:
    """Who waits when the subscription is lost returns early, and who waits then is woken as before."""
    session = await stored_session(pair.a)
    await pair.a.leases.take(session.key, "n")
    waiter = asyncio.get_running_loop().create_task(pair.b.leases.wait_free(session.key, 30))
    await until_subscribed(pair.b)
    redis_server.command("CLIENT", "KILL", "TYPE", "pubsub")
    async with asyncio.timeout(10):
        await waiter
    waiter = asyncio.get_running_loop().create_task(pair.b.leases.wait_free(session.key, 30))
    await until_subscribed(pair.b)
    began = time.monotonic()
    await pair.a.leases.give_back(session.key, "n")
    async with asyncio.timeout(10):
        await waiter
    assert time.monotonic() - began < SOON_S


async def test_what_a_store_leaves_is_free_at_once(pair: Pair) -> None:
    """A store that is closed has no lease any more; opened again by the same boot before others, it has."""
    session = await stored_session(pair.a)
    turn = make_turn(session)
    await pair.a.start_turn(session, running(turn))
    await pair.a.leases.announce()
    await pair.a.close()
    assert await pair.b.leases.holder(session.key) is None
    assert await pair.b.leases.nodes() == ()
    await pair.a.open("a", "http://a:1")
    holder = await pair.b.leases.holder(session.key)
    assert holder is not None
    assert holder.turn_id == turn.turn_id
    await pair.a.close()
    await pair.b.leases.take(session.key, "n")
    assert (await pair.b.get_turn(session, turn.turn_id)).status is TurnStatus.FAILED
