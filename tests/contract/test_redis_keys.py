"""Which keys a Redis store makes, that none is left behind, and how often it asks."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from app.domain.checkpoint import AutoCheckpoint
from app.domain.idempotency import Binding
from app.domain.ids import SessionKey
from app.domain.journal import StateChanged
from app.domain.session import LifeSpan, Session, SessionChange, SessionQuery, SessionStatus
from app.domain.state import StateScope
from app.domain.turn import Usage
from app.stores.redis import keys, sums
from app.stores.redis.draft import MARGIN_MS, SLACK_MS
from app.stores.redis.store import RedisStore
from tests.redisserver import RedisServer

from .builders import (
    BOOT,
    LIFE,
    T0,
    extend,
    failed,
    make_checkpoint,
    make_note,
    make_session,
    make_turn,
    new_id,
    running,
    stored_session,
)
from .conftest import fresh_prefix

HOSTILE = [
    "a",
    "{x}",
    "a}:s",
    "a:b",
    "a/b",
    "%2F",
    "a\nb",
    "*",
    "?",
    "[a]",
    "\\",
    " ",
    "алиса 🦊",
    "\ud800",
    "{",
]
SESSION_MS = LIFE.ttl_s * 1000 + LIFE.retention_s * 1000 + MARGIN_MS
LASTING = {"n", "g", "h", "secret", "nodes"}


class World:
    """A store, and what can be seen of it from beside."""

    def __init__(self, server: RedisServer, client: Redis, prefix: str) -> None:
        self.server = server
        self.client = client
        self.prefix = prefix
        self.store = RedisStore(server.url, LIFE, prefix=prefix)

    async def names(self) -> set[str]:
        return {name.decode() async for name in self.client.scan_iter(f"{self.prefix}:*", count=1000)}

    async def of_session(self, session: Session) -> set[str]:
        start = f"{self.prefix}:{{{keys.tag_of(session.key)}}}"
        return {name for name in await self.names() if name.startswith(start)}

    @contextmanager
    def counted(self) -> Iterator[list[object]]:
        """Give a list to which each round trip of the store adds what it calls."""
        calls: list[object] = []
        wire = self.store._db.wire
        call = wire.call

        async def counted(*words: object, **options: object) -> object:
            calls.append(words[0])
            return await call(*words, **options)  # type: ignore[arg-type]

        wire.call = counted  # type: ignore[method-assign, assignment]
        try:
            yield calls
        finally:
            wire.call = call  # type: ignore[method-assign]


@pytest.fixture
async def world(redis_server: RedisServer) -> AsyncIterator[World]:
    client = Redis.from_url(redis_server.url)
    world = World(redis_server, client, f"keys-{uuid4().hex}")
    await world.store.open(BOOT)
    yield world
    await world.store.close()
    await client.aclose()


async def full_session(store: RedisStore, session_id: str = "s1", **fields: object) -> Session:
    """Return a session that has something of everything that a session can have."""
    session = await stored_session(store, session_id, user_id="u", state={"a": 1}, **fields)
    turn = make_turn(session, binding=Binding("", f"key-{session_id}", b"f" * 16))
    await store.start_turn(session, running(turn))
    session = await store.commit_turn(session, turn, checkpoint=AutoCheckpoint(new_id(), 3))
    await store.record_turn(session, failed(make_turn(session)))
    session = await store.patch_state(session.key, {"b": 2}, T0)
    await store.add_checkpoint(session, make_checkpoint())
    return await store.add_note(session, make_note(turn.turn_id), Usage(1, 1))


@pytest.mark.parametrize("owner", HOSTILE)
async def test_no_name_gets_out_of_its_place(world: World, owner: str) -> None:
    """Whatever owner, user, agent and id are called, sessions stay apart, are found, listed and removed."""
    names = [SessionKey(owner, "a"), SessionKey("", f"{owner}/a"), SessionKey(f"{owner}/a", "")]
    sessions = [make_session(owner=key.owner, user_id=owner, agent_id=owner) for key in names]
    sessions = [Session(**{**_fields(one), "key": key}) for one, key in zip(sessions, names, strict=True)]
    for session in sessions:
        await world.store.create_session(session)
        assert keys.key_of(keys.tag_of(session.key)) == session.key
    for session in sessions:
        assert await world.store.find_session(session.key) == session
        query = SessionQuery(owner=session.key.owner, now=T0, user_id=owner)
        assert (await world.store.list_sessions(query)).sessions == (session,)
        assert await world.store.list_keys(session.key.owner, agent_id=owner, limit=9) == (session.key,)
    assert await world.store.list_after(None, 9) == tuple(sorted(names))
    assert all(name.startswith(f"{world.prefix}:") and name.isascii() for name in await world.names())
    assert (await world.store.delete_sessions(names)).sessions == 3


def _fields(session: Session) -> dict[str, object]:
    return {name: getattr(session, name) for name in Session.__dataclass_fields__}


def test_scopes_and_keys_come_back() -> None:
    """What is encoded for a key is decoded to the same."""
    for one in HOSTILE:
        for scope in (StateScope(one), StateScope("x", one, "u"), StateScope("x", "", one)):
            assert keys.of_scope(keys.scope_name(scope)) == scope
        assert keys.of_user(keys.user_of(one, "u")) == (one, "u")


@pytest.mark.parametrize("way", ["delete", "purge"])
async def test_nothing_is_left_of_a_session(world: World, way: str) -> None:
    """After a delete or a purge no key, no index and no lease has anything of it; what is others' stays."""
    bare = await world.names()
    session = await full_session(world.store)
    await world.store.start_turn(session, running(make_turn(session)))
    assert len(await world.of_session(session)) == 12
    await world.store.patch_shared(StateScope("default"), {"a": 1}, T0)
    if way == "delete":
        assert await world.store.delete_session(session.key)
    else:
        await world.store.leases.give_back(session.key, (await _running(world.store, session)))
        assert await world.store.expire_and_purge(T0 * 2, 9) == (1, 1)
    left = {name.removeprefix(f"{world.prefix}:").partition(":")[0] for name in await world.names() - bare}
    assert left == {"n", "g", "h"}


async def _running(store: RedisStore, session: Session) -> str:
    holder = await store.leases.holder(session.key)
    assert holder is not None
    return holder.nonce


async def test_every_key_of_a_session_goes_by_itself(world: World) -> None:
    """Each has an end, some days behind the purge, and none of what is shared, or the user's, has one."""
    session = await full_session(world.store)
    await world.store.patch_shared(StateScope("default", "", "u"), {"a": 1}, T0)
    bound = {name for name in await world.names() if name.startswith(f"{world.prefix}:k:")}
    assert len(bound) == 1
    mine = await world.of_session(session) | bound
    assert len(mine) == 12
    for name in mine:
        left = await world.client.pttl(name)
        assert SESSION_MS - SLACK_MS - 60_000 <= left <= SESSION_MS + SLACK_MS, name
    for name in await world.names() - mine:
        assert await world.client.pttl(name) == -1, name


async def test_activity_puts_the_end_off(world: World) -> None:
    """When much of the margin is gone a write renews all keys, the idempotency keys too."""
    session = await full_session(world.store)
    tag = keys.tag_of(session.key)
    for name in await world.names():
        if tag in name or ":k:" in name:
            await world.client.pexpire(name, 600_000)
    await world.client.hset(f"{world.prefix}:{{{tag}}}:s", "e", 1)
    await world.store.touch_session(session.key, T0)
    for name in await world.names():
        if tag in name or ":k:" in name:
            assert await world.client.pttl(name) > SESSION_MS - 60_000, name


async def test_what_never_expires_has_no_end(world: World) -> None:
    """Archived, its keys stay for ever; active again, they have an end again."""
    session = await full_session(world.store)
    for status, has_end in ((SessionStatus.ARCHIVED, False), (SessionStatus.ACTIVE, True)):
        await world.store.update_session(session.key, SessionChange(status=status), T0)
        for name in await world.of_session(session):
            assert (await world.client.pttl(name) > 0) == has_end, (status, name)


@pytest.mark.parametrize("life", [LifeSpan(idle_after_s=100, ttl_s=1000, retention_s=0)])
async def test_without_retention_no_key_has_an_end(redis_server: RedisServer, life: LifeSpan) -> None:
    """Where nothing is purged nothing goes by itself."""
    store = RedisStore(redis_server.url, life, prefix=fresh_prefix())
    await store.open(BOOT)
    await full_session(store)
    client = Redis.from_url(redis_server.url)
    names = [name async for name in client.scan_iter(f"{store._prefix}:*", count=1000)]
    assert {await client.pttl(name) for name in names} == {-1}
    await store.close()
    await client.aclose()


async def test_what_went_by_itself_is_swept(world: World) -> None:
    """Counts, lists and totals are right again after a sweep, and the key can be used meanwhile."""
    session, kept = await full_session(world.store), await full_session(world.store, "kept")
    bound = f"{world.prefix}:k:{keys.bound_name('', 'key-s1')}"
    await world.client.delete(bound, *(await world.of_session(session)))
    query = SessionQuery(owner="", now=T0, user_id="u")
    assert (await world.store.list_sessions(query)).sessions == (kept,)
    assert await world.store.find_session(session.key) is None
    again = await stored_session(world.store, "s1", ttl_s=0)
    await world.store.update_session(kept.key, SessionChange(status=SessionStatus.ARCHIVED), T0)
    await world.store.expire_and_purge(T0 * 2, 9)
    stats = await world.store.get_session_stats()
    assert (stats.total, stats.idle, stats.archived, stats.expired) == (2, 1, 1, 0)
    assert await world.store.list_after(None, 9) == (kept.key, again.key)
    assert (await world.store.delete_sessions([kept.key, again.key])).sessions == 2
    left = {name.removeprefix(f"{world.prefix}:").partition(":")[0] for name in await world.names()}
    assert left <= LASTING


async def test_another_idle_time_counts_at_the_next_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start with another ``idle_after_s`` counts by that, in steps; what was marked idle stays so."""
    monkeypatch.setattr(sums, "SESSIONS_PER_STEP", 3)
    marked = [make_session(f"m{n}", marked_idle=True) for n in range(2)]
    ended = [make_session("short", ttl_s=5), make_session("archived", archived=True)]
    timed = [make_session(f"s{n}", now=T0 + n * 10_000) for n in range(10)]
    await world.store.create_sessions([*timed, *marked, *ended])
    await world.store.expire_and_purge(T0 + 150_000, 10)
    await world.store.touch_session(timed[0].key, T0 + 150_000)
    for idle_after_s, idle in ((100, 5), (80, 7), (0, 0), (500, 0), (60, 9), (100, 5)):
        life = replace(LIFE, idle_after_s=idle_after_s)
        for now in (None, T0 + 150_000, T0 + 140_000):
            other = RedisStore(world.server.url, life, prefix=world.prefix)
            await other.open(BOOT)
            if now is not None:
                assert await other.expire_and_purge(now, 10) == (0, 0)
            stats = await other.get_session_stats()
            assert (stats.active, stats.idle) == (10 - idle, idle + len(marked))
            assert (stats.archived, stats.expired) == (1, 1)
            await other.close()
    keys_of_all = [session.key for session in (*timed, *marked, *ended)]
    assert (await world.store.delete_sessions(keys_of_all)).sessions == len(keys_of_all)
    left = {name.removeprefix(f"{world.prefix}:").partition(":")[0] for name in await world.names()}
    assert left <= LASTING


async def test_a_warm_turn_asks_twice(world: World) -> None:
    """Its start with the lease is one round trip and its commit with all that goes with it another."""
    session, _ = await extend(world.store, await stored_session(world.store, user_id="u"), 3)
    with world.counted() as calls:
        for number in range(5):
            turn = make_turn(session, binding=Binding("", f"k{number}", b"f" * 16))
            assert await world.store.start_turn(session, running(turn)) is None
            session = await world.store.commit_turn(session, turn, checkpoint=AutoCheckpoint(new_id(), 3))
            session = world.store.recall_session(session.key) or session
    assert calls == ["EVALSHA"] * 10
    assert session.depth == 8


async def test_a_long_path_is_read_in_few_round_trips(world: World) -> None:
    """A thousand turns are one, and what a turn writes does not grow with them."""
    session = await stored_session(world.store)
    sizes = []
    for _ in range(1000):
        turn = make_turn(session)
        session = await world.store.commit_turn(session, turn)
    tag = keys.tag_of(session.key)
    sizes = [len(raw) for raw in (await world.client.hgetall(f"{world.prefix}:{{{tag}}}:t")).values()]
    assert max(sizes) - min(sizes) <= 4
    with world.counted() as calls:
        path = await world.store.load_path(session)
    assert calls == ["EVALSHA"]
    assert len(path.messages) == 2000


async def test_two_prefixes_do_not_meet(world: World) -> None:
    """Stores with different prefixes share a server and nothing else."""
    other = RedisStore(world.server.url, LIFE, prefix=f"{world.prefix}-2")
    await other.open(BOOT)
    session = await stored_session(world.store)
    assert await other.find_session(session.key) is None
    assert other.session_count_nowait() == 0
    assert (await other.dump_rest()).totals == {}
    await other.close()


async def test_a_whole_store_moves(world: World) -> None:
    """What is dumped and loaded elsewhere, twice, is dumped from there again as the same."""
    session = await full_session(world.store)
    await full_session(world.store, "other", owner="o")
    await world.store.patch_shared(StateScope("default", "o", "u"), {"a": 1}, T0)
    await world.store.delete_session((await stored_session(world.store, "gone")).key)
    there = RedisStore(world.server.url, LIFE, prefix=f"{world.prefix}-2")
    await there.open(BOOT)
    listed = await world.store.list_after(None, 9)
    for _ in range(2):
        for key in listed:
            dump = await world.store.dump_session(key)
            assert dump is not None
            assert [len(part) for part in (dump.turns, dump.notes, dump.facts, dump.checkpoints)] == [
                2,
                1,
                2,
                2,
            ]
            assert isinstance(dump.facts[0].fact, StateChanged)
            await there.load_session(dump)
            assert await there.dump_session(key) == dump
        await there.load_rest(await world.store.dump_rest())
    assert await there.list_after(None, 9) == listed
    assert await there.dump_rest() == await world.store.dump_rest()
    here_stats, there_stats = await asyncio.gather(world.store.get_session_stats(), there.get_session_stats())
    assert here_stats == there_stats
    found = await there.find_bound("", "key-s1")
    assert found is not None
    assert found.turn == await world.store.get_turn(session, found.turn.turn_id)
    await there.close()
