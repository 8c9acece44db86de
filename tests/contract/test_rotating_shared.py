"""``rotate-keys`` on a store that a server uses nevertheless, or that does not let itself be scrubbed."""

import asyncio
import base64

import pytest

from app.config import Settings
from app.domain.errors import SessionExists
from app.rotate import rotate
from app.stores.keyring import KeyRing
from app.stores.postgres import PostgresStore
from app.stores.redis import records
from app.stores.redis.draft import new_draft
from app.stores.redis.store import RedisStore
from tests.redisserver import RedisServer

from .builders import BOOT, LIFE, current, extend, make_session, make_turn, running, stored_session
from .checks import until_awaited
from .conftest import fresh_prefix

KEY = b"k" * 32


def settings_for(url: str) -> Settings:
    ring = base64.b64encode(KEY).decode()
    return Settings(store_url=url, encryption_keys=ring, accept_volatile=True)


@pytest.mark.parametrize("force", [False, True])
async def test_a_server_that_starts_meanwhile_loses_nothing_and_is_told_of(
    postgres_url: str, capsys: pytest.CaptureFixture[str], force: bool
) -> None:
    """Its turn is committed; the rotation is no success then, unless the operator knows of it."""
    server = PostgresStore(postgres_url, LIFE, accept_volatile=True, keys=KeyRing([KEY]))
    await server.open(BOOT, "http://127.0.0.1:1")
    session, turns = await extend(server, await stored_session(server), 1)
    turn = make_turn(session)
    await server.start_turn(session, running(turn))
    rotating = asyncio.ensure_future(rotate(settings_for(postgres_url), force=force, skip_broken=False))
    await until_awaited(postgres_url)
    await server.leases.announce()
    await server.commit_turn(session, turn)
    assert await rotating is force
    assert ("server(s) have begun to use it" in capsys.readouterr().err) is not force
    branch = await server.list_branch(await current(server, session), 9)
    assert [one.turn_id for one in branch] == [turns[0].turn_id, turn.turn_id]
    await server.close()


async def test_a_scrub_that_is_refused_is_a_warning(
    redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """All is encrypted; one line says what to do, and whoever skips what is broken has a success."""
    redis_server.command("ACL", "SETUSER", "tenant", "on", ">pass", "~*", "&*", "+@all", "-bgrewriteaof")
    url = f"redis://tenant:pass@127.0.0.1:{redis_server.port}/7"
    store = RedisStore(url, LIFE)
    await store.open(BOOT)
    session, turns = await extend(store, await stored_session(store), 2)
    await store.close()
    assert await rotate(settings_for(url), force=False, skip_broken=False) is False
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert "warning: the database may still hold what it was before" in line
    assert "BGREWRITEAOF" in line
    assert said.out.splitlines()[-1] == "encrypted with the first key"
    assert await rotate(settings_for(url), force=False, skip_broken=True) is True
    store = RedisStore(url, LIFE, keys=KeyRing([KEY]))
    await store.open(BOOT)
    assert len(await store.list_branch(session, 9)) == len(turns)
    assert await store.delete_session(session.key)
    await store.close()
    redis_server.command("ACL", "DELUSER", "tenant")


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_record_that_was_written_since_is_not_replaced(
    redis_server: RedisServer, is_there: bool
) -> None:
    """Whoever replaces a record by its token is refused if that has another one by now, or is gone."""
    store = RedisStore(redis_server.url, LIFE, prefix=fresh_prefix())
    await store.open(BOOT)
    session = await stored_session(store, title="mine")
    record = await store._db.get_by_key(session.key)
    if is_there:
        there = await store.touch_session(session.key, session.last_accessed + 1000)
    else:
        await store.delete_session(session.key)
        there = None
    draft = new_draft(store._sealer, make_session(session.key.session_id, title="other"))
    (refusal,) = await records.create(store._db, [draft], replaces=record.token)
    assert isinstance(refusal, SessionExists)
    assert await store.find_session(session.key) == there
    await store.close()
