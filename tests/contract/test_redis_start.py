"""On which servers a Redis store opens, and what it says of the others."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext

import pytest
from redis.asyncio import Redis

from app.domain.errors import StoreUnavailable
from app.stores.redis.store import RedisStore
from tests.redisserver import RedisServer

from .builders import BOOT, LIFE, stored_session


@pytest.fixture(scope="module")
def own_server() -> Iterator[RedisServer]:
    """A server whose settings these tests may change."""
    server = RedisServer()
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
async def store(own_server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(own_server.url, LIFE, prefix="start")
    yield store
    await store.close()
    for words in (("appendonly", "yes"), ("maxmemory", "0"), ("maxmemory-policy", "noeviction")):
        own_server.command("CONFIG", "SET", *words)


async def test_a_server_that_forgets_is_refused(own_server: RedisServer, store: RedisStore) -> None:
    """Without an append-only file the store does not open, and says why in one line."""
    own_server.command("CONFIG", "SET", "appendonly", "no")
    with pytest.raises(ValueError, match="appendonly is not on") as caught:
        await store.open(BOOT)
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreUnavailable):
        await store.ping()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "volatile-lru"])
async def test_a_server_that_evicts_is_refused(
    own_server: RedisServer, store: RedisStore, policy: str
) -> None:
    """With a memory limit any policy but noeviction is; without a limit no policy matters."""
    own_server.command("CONFIG", "SET", "maxmemory-policy", policy)
    await store.open(BOOT)
    await store.close()
    own_server.command("CONFIG", "SET", "maxmemory", "512mb")
    with pytest.raises(ValueError, match="maxmemory-policy is not noeviction"):
        await store.open(BOOT)
    own_server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    await store.open(BOOT)
    await store.ping()


async def test_what_is_volatile_can_be_accepted(
    own_server: RedisServer, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever accepts it is warned, and the store works."""
    own_server.command("CONFIG", "SET", "appendonly", "no")
    store = RedisStore(own_server.url, LIFE, prefix="start", accept_volatile=True)
    with caplog.at_level(logging.WARNING):
        await store.open(BOOT)
    assert "MAY GET LOST" in caplog.text
    assert await store.find_session((await stored_session(store, "volatile")).key) is not None
    await store.close()


async def test_a_replica_is_refused(own_server: RedisServer, store: RedisStore) -> None:
    """A replica says so and cannot be written to."""
    own_server.command("REPLICAOF", "127.0.0.1", "1")
    try:
        with pytest.raises(ValueError, match="replica"):
            await store.open(BOOT)
    finally:
        own_server.command("REPLICAOF", "NO", "ONE")


async def test_a_cluster_is_refused() -> None:
    """A node of a Redis Cluster is no single primary."""
    server = RedisServer("--cluster-enabled", "yes")
    store = RedisStore(server.url, LIFE)
    try:
        server.start()
        with pytest.raises(ValueError, match="Redis Cluster is not supported"):
            await store.open(BOOT)
    finally:
        server.close()
        await store.close()


async def test_waiting_for_the_disk_needs_a_server_that_can(own_server: RedisServer) -> None:
    """Before 7.2 there is no WAITAOF: asked for, it is refused at the start, not at the first commit."""
    store = RedisStore(own_server.url, LIFE, prefix="fence", fsync_wait_ms=500)
    can_wait = not own_server.command("WAITAOF").startswith(b"-ERR unknown command")
    with nullcontext() if can_wait else pytest.raises(ValueError, match=r"7\.2"):
        await store.open(BOOT)
        await stored_session(store, "fenced")
    await store.close()


@pytest.mark.parametrize("wait_ms", [-1, 901])
def test_a_wait_for_the_disk_has_bounds(wait_ms: int) -> None:
    """It ends before the connection's own limit does."""
    with pytest.raises(ValueError, match="fsync_wait_ms"):
        RedisStore("redis://h", LIFE, fsync_wait_ms=wait_ms)


async def test_nobody_there_is_one_clear_line() -> None:
    """A port that nobody listens on is StoreUnavailable at once, without the address or the password."""
    store = RedisStore("redis://u:s3cret@127.0.0.1:1/0", LIFE)
    with pytest.raises(StoreUnavailable) as caught:
        await store.open(BOOT)
    assert str(caught.value) == "Redis cannot be reached."
    await store.close()


async def test_a_wrong_password_is_one_clear_line(own_server: RedisServer) -> None:
    """It is StoreUnavailable, and the password is not told."""
    own_server.command("ACL", "SETUSER", "somebody", "on", ">right", "~*", "+@all")
    store = RedisStore(own_server.url.replace("://", "://somebody:s3cret@"), LIFE)
    with pytest.raises(StoreUnavailable) as caught:
        await store.open(BOOT)
    assert "s3cret" not in f"{caught.value}"
    await store.close()


async def test_a_user_who_may_not_ask_is_warned(
    own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the server says nothing of itself the store opens, and says what it could not find out."""
    own_server.command("ACL", "SETUSER", "narrow", "on", ">word", "~*", "&*", "+@all", "-info", "-config")
    store = RedisStore(own_server.url.replace("://", "://narrow:word@"), LIFE, prefix="narrow")
    with caplog.at_level(logging.WARNING):
        await store.open(BOOT)
    assert caplog.text.count("does not say whether this is so") == 2
    await stored_session(store)
    await store.close()


async def test_a_client_that_exists_stays_open(own_server: RedisServer) -> None:
    """The store connects as the client does, decoding or not, and closing it leaves the client usable."""
    client = Redis.from_url(own_server.url, decode_responses=True)
    store = RedisStore(client, LIFE, prefix="client")
    await store.open(BOOT)
    session = await stored_session(store, "s1")
    assert await store.find_session(session.key) == session
    await store.close()
    assert await client.ping()
    await client.aclose()


async def test_the_store_finds_the_primary_through_a_sentinel(own_server: RedisServer) -> None:
    """An address of sentinels and a service opens the server that they name."""
    sentinel = RedisServer()
    folder = sentinel.folder
    config = folder / "sentinel.conf"
    config.write_text(f"sentinel monitor main 127.0.0.1 {own_server.port} 1\n")
    store = RedisStore(f"redis+sentinel://127.0.0.1:{sentinel.port}/main/0", LIFE, prefix="sentinel")
    try:
        sentinel.start_sentinel(config)
        await store.open(BOOT)
        session = await stored_session(store, "s1")
        assert await store.find_session(session.key) == session
    finally:
        await store.close()
        sentinel.close()


async def test_ten_stores_open_at_once(own_server: RedisServer) -> None:
    """Processes that start together do not stand in each other's way."""
    stores = [RedisStore(own_server.url, LIFE, prefix="ten") for _ in range(10)]
    await asyncio.gather(*(store.open(f"boot-{number}") for number, store in enumerate(stores)))
    session = await stored_session(stores[0], "s1")
    assert [await store.find_session(session.key) for store in stores] == [session] * 10
    for store in stores:
        await store.close()
