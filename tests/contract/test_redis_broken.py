"""What becomes of values that something else has changed: the session is set aside, the rest goes on."""

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from app.domain.checkpoint import Checkpoint
from app.domain.errors import SnapshotUnreadable
from app.domain.idempotency import Binding
from app.domain.ids import to_id_bytes
from app.domain.session import Session, SessionChange, SessionQuery
from app.domain.state import StateScope
from app.domain.turn import Turn, TurnStatus, Usage
from app.stores.redis import keys
from app.stores.redis.store import RedisStore
from tests.redisserver import RedisServer

from .builders import BOOT, LIFE, T0, extend, make_checkpoint, make_note, make_turn, stored_session


class Hand:
    """Changes values behind the store's back."""

    def __init__(self, client: Redis, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    async def flip(self, session: Session, room: str, field: bytes | str, at: int) -> None:
        """Change one byte of a field of a hash."""
        name = f"{self._prefix}:{{{keys.tag_of(session.key)}}}:{room}"
        raw = bytearray(await self._client.hget(name, field) or b"")
        raw[at] ^= 1
        await self._client.hset(name, field, bytes(raw))

    async def put(self, session: Session, room: str, field: bytes | str, raw: bytes) -> None:
        await self._client.hset(f"{self._prefix}:{{{keys.tag_of(session.key)}}}:{room}", field, raw)

    async def put_rest(self, name: str, field: str, raw: bytes) -> None:
        await self._client.hset(f"{self._prefix}:{name}", field, raw)


@pytest.fixture
def prefix() -> str:
    return f"broken-{uuid4().hex}"


@pytest.fixture
async def store(redis_server: RedisServer, prefix: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(redis_server.url, LIFE, prefix=prefix)
    await store.open(BOOT)
    yield store
    await store.close()


@pytest.fixture
async def hand(redis_server: RedisServer, prefix: str) -> AsyncIterator[Hand]:
    client = Redis.from_url(redis_server.url)
    yield Hand(client, prefix)
    await client.aclose()


async def _two_sessions(store: RedisStore) -> tuple[Session, list[Turn], Session]:
    hit, turns = await extend(store, await stored_session(store, "hit", state={"a": 1}), 3)
    well, _ = await extend(store, await stored_session(store, "well"), 3)
    return hit, turns, well


@pytest.mark.parametrize("at", [0, 16, 17, 21, 25, 33, 41, 43, 44, 60, 90, -1])
async def test_a_broken_turn_sets_its_session_aside(store: RedisStore, hand: Hand, at: int) -> None:
    """Any changed byte of a turn makes its path unreadable; its neighbours and other sessions are not."""
    hit, turns, well = await _two_sessions(store)
    await hand.flip(hit, "t", to_id_bytes(turns[1].turn_id), at)
    with pytest.raises(SnapshotUnreadable) as caught:
        await store.load_path(hit)
    assert caught.value.session_id == "hit"
    with pytest.raises(SnapshotUnreadable):
        await store.get_turn(hit, turns[1].turn_id)
    listed = {turn.turn_id: turn for turn in (await store.list_turns(hit, 9)).turns}
    broken = listed.pop(turns[1].turn_id)
    assert broken.status is TurnStatus.FAILED
    assert broken.error is not None
    assert broken.error.code == "SNAPSHOT_UNREADABLE"
    assert [turn.status for turn in listed.values()] == [TurnStatus.FINISHED] * 2
    assert len((await store.load_path(well)).messages) == 6
    assert await store.delete_session(hit.key)


@pytest.mark.parametrize("raw", [b"", b"x", b"x" * 60])
async def test_rubbish_for_a_turn_harms_nothing_else(store: RedisStore, hand: Hand, raw: bytes) -> None:
    """Whatever stands in a turn's place, lists go on behind it."""
    hit, turns, _ = await _two_sessions(store)
    await hand.put(hit, "t", to_id_bytes(turns[1].turn_id), raw)
    with pytest.raises(SnapshotUnreadable):
        await store.load_path(hit)
    with pytest.raises(SnapshotUnreadable):
        await store.list_branch(hit, 9)
    entries = await store.list_entries(hit, None, 9, newest_first=False)
    assert [getattr(entry, "turn_id", None) for entry in entries] == [turn.turn_id for turn in turns]
    assert await store.delete_session(hit.key)


@pytest.mark.parametrize(
    ("field", "at"), [("r", 0), ("r", 3), ("r", 20), ("r", -1), ("j", 0), ("j", 9), ("j", -1)]
)
async def test_a_broken_record_sets_its_session_aside(
    store: RedisStore, hand: Hand, field: str, at: int
) -> None:
    """It is unreadable, listings leave it out, nothing builds on it, and it can be deleted."""
    hit, _, well = await _two_sessions(store)
    await hand.flip(hit, "s", field, at)
    with pytest.raises(SnapshotUnreadable) as caught:
        await store.find_session(hit.key)
    assert caught.value.session_id == "hit"
    with pytest.raises(SnapshotUnreadable):
        await store.update_session(hit.key, SessionChange(title="new"), T0)
    page = await store.list_sessions(SessionQuery(owner="", now=T0))
    assert [session.key for session in page.sessions] == [well.key]
    assert (await store.expire_and_purge(T0 * 2, 9)) == (2, 2)


async def test_a_record_of_another_session_is_not_believed(store: RedisStore, hand: Hand) -> None:
    """A whole record that was copied to another session's place is unreadable there."""
    hit, _, well = await _two_sessions(store)
    name = f"{hand._prefix}:{{{keys.tag_of(well.key)}}}:s"
    for field in "rju":
        await hand.put(hit, "s", field, await hand._client.hget(name, field) or b"")
    with pytest.raises(SnapshotUnreadable):
        await store.find_session(hit.key)


async def test_broken_states_notes_and_checkpoints_are_noticed(store: RedisStore, hand: Hand) -> None:
    """What needs them is unreadable, what does not goes on."""
    hit, turns, _ = await _two_sessions(store)
    made = await store.add_checkpoint(hit, make_checkpoint())
    whole = await store.add_checkpoint(hit, make_checkpoint())
    note = make_note(turns[0].turn_id)
    hit = await store.add_note(hit, note, Usage(1, 1))
    await hand.flip(hit, "c", to_id_bytes(made.checkpoint_id), -1)
    with pytest.raises(SnapshotUnreadable):
        await store.get_checkpoint(hit, made.checkpoint_id)
    assert (await store.list_checkpoints(hit, 9)).checkpoints == (whole,)
    await hand.flip(hit, "n", to_id_bytes(note.note_id), -1)
    for call in (store.load_path(hit), store.get_note(hit)):
        with pytest.raises(SnapshotUnreadable):
            await call
    await hand.flip(hit, "k", "1", -1)
    with pytest.raises(SnapshotUnreadable):
        await store.at_turn(hit, turns[0].turn_id)
    assert (await store.commit_turn(hit, make_turn(hit))).depth == 4


@pytest.mark.parametrize("broken", [{0}, {1}, {2}, {4}, {0, 1}, {0, 1, 2}, {2, 3, 4}, set(range(5))])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
async def test_pages_of_checkpoints_go_on_behind_broken_ones(
    store: RedisStore, hand: Hand, broken: set[int], limit: int
) -> None:
    """Wherever on a page the broken ones stand, the pages end, and together list all others once."""
    session = await stored_session(store)
    made = [await store.add_checkpoint(session, make_checkpoint(created_at=T0 + n)) for n in range(5)]
    for number in broken:
        await hand.flip(session, "c", to_id_bytes(made[number].checkpoint_id), -1)
    listed: list[Checkpoint] = []
    cursor, is_last = None, False
    async with asyncio.timeout(5):
        while not is_last:
            page = await store.list_checkpoints(session, limit, cursor)
            assert len(page.checkpoints) <= limit
            listed += page.checkpoints
            cursor, is_last = page.next_cursor, page.next_cursor is None
    assert listed == [one for number, one in reversed(list(enumerate(made))) if number not in broken]


async def test_broken_keys_and_shared_states_are_noticed(store: RedisStore, hand: Hand) -> None:
    """Neither a wrong turn nor a wrong state is ever shown."""
    session = await stored_session(store)
    turns = [make_turn(session, binding=Binding("", "k", b"f" * 16))]
    session = await store.commit_turn(session, turns[0])
    other = make_turn(session)
    await store.commit_turn(session, other)
    await hand.put_rest(f"k:{keys.bound_name('', 'k')}", "t", to_id_bytes(other.turn_id))
    with pytest.raises(SnapshotUnreadable):
        await store.find_bound("", "k")
    scope = StateScope("default")
    await store.patch_shared(scope, {"a": 1}, T0)
    await hand.put_rest(f"h:{keys.scope_name(scope)}", "v", b"\x01rubbish")
    for call in (store.get_shared(scope), store.patch_shared(scope, {"b": 1}, T0)):
        with pytest.raises(SnapshotUnreadable):
            await call
