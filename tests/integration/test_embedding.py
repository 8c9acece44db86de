"""The documents' scenarios for programs that embed the classes, adapted: no HTTP, the demo model."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import pytest

from app import ChatService, Runtime, SessionManager, Settings
from app.domain.branch import Back
from app.domain.chat import ChatRequest
from app.domain.errors import CheckpointNotFound, PreconditionFailed, SessionNotFound
from app.domain.events import TextDelta, TurnFinished, TurnStarted
from app.domain.ids import SessionKey
from app.domain.journal import StateChanged
from app.domain.session import SessionChange, SessionStatus
from app.domain.state import StateScope
from app.services.sessions import SessionView


@pytest.fixture(params=["memory", "sqlite"])
async def pool(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Runtime]:
    url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'agentpool.db'}"
    async with Runtime(Settings(_env_file=None, store_url=url, model_provider="demo")) as runtime:
        yield runtime


@pytest.fixture
def sessions(pool: Runtime) -> SessionManager:
    return pool.sessions


@pytest.fixture
def chat(pool: Runtime) -> ChatService:
    return pool.chat


# -- second document: session management ------------------------------------------------


async def test_second_document_creates_finds_and_deletes(sessions: SessionManager):
    """Create, get, update, refresh, list by user, count, exists, delete one, by user and by agent."""
    plain = await sessions.create(user_id="user_123", agent_id="assistant")
    rich = await sessions.create(user_id="user_123", metadata={"language": "zh-CN", "tier": "premium"})
    found = await sessions.get(rich.session_id)
    assert (found.session.user_id, found.session.agent_id) == ("user_123", "assistant")
    updated = await sessions.update_metadata(rich.session_id, {"tier": None, "message_count": 5})
    assert updated.session.metadata == {"language": "zh-CN", "message_count": 5}
    assert (await sessions.refresh(plain.session_id)).status is SessionStatus.ACTIVE
    listed = await sessions.list(user_id="user_123")
    assert {view.session_id for view in listed.views} == {plain.session_id, rich.session_id}
    assert await sessions.active_count("user_123") == await sessions.active_count() == 2
    assert await sessions.exists(plain.session_id)
    await sessions.delete(plain.session_id)
    assert not await sessions.exists(plain.session_id)
    with pytest.raises(SessionNotFound):
        await sessions.get(plain.session_id)
    await sessions.create(user_id="user_123")
    assert await sessions.delete_all(user_id="user_123") == 2
    await sessions.create(user_id="somebody")
    assert await sessions.delete_all(agent_id="assistant") == 1


async def test_second_document_saves_and_resumes_checkpoints(sessions: SessionManager, chat: ChatService):
    """Two turns with a checkpoint each; the latest one resumes the conversation, none is lost by a rewind."""
    session_id = (await sessions.create(user_id="user_123")).session_id
    with pytest.raises(CheckpointNotFound):
        await sessions.latest_checkpoint(session_id)
    await chat.chat(session_id, "My name is Alice")
    first = await sessions.create_checkpoint(session_id, data={"turn": 1, "pending_question": "location"})
    await chat.chat(session_id, "I'm in Beijing")
    second = await sessions.create_checkpoint(session_id, label="done", data={"turn": 2, "complete": True})
    assert await sessions.latest_checkpoint(session_id) == second
    assert (await sessions.get_checkpoint(session_id, first.checkpoint_id)).data["turn"] == 1
    page = await sessions.list_checkpoints(session_id)
    assert page.checkpoints == (second, first)
    restored = await sessions.restore(session_id, first.checkpoint_id)
    assert restored.session.turn_count == 1
    history = await sessions.history(session_id)
    assert [turn.input for turn in history.turns] == ["My name is Alice"]
    assert "Alice" in (await chat.chat(session_id, "What is my name?")).reply
    await sessions.delete_checkpoint(session_id, first.checkpoint_id)
    with pytest.raises(CheckpointNotFound):
        await sessions.restore(session_id, first.checkpoint_id)
    assert await sessions.clear_checkpoints(session_id) == 1


async def test_second_document_sets_and_reads_the_status(sessions: SessionManager):
    """Idle by hand, active again, archived, and the sessions that are active."""
    session_id = (await sessions.create(user_id="user_123")).session_id
    assert await sessions.status(session_id) is SessionStatus.ACTIVE
    await sessions.set_status(session_id, SessionStatus.IDLE)
    assert await sessions.status(session_id) is SessionStatus.IDLE
    assert await sessions.all_active() == []
    await sessions.set_status(session_id, SessionStatus.ACTIVE)
    assert [view.session_id for view in await sessions.all_active("user_123")] == [session_id]
    await sessions.set_status(session_id, SessionStatus.ARCHIVED)
    assert await sessions.status(session_id) is SessionStatus.ARCHIVED


async def test_second_document_personalises_by_template(sessions: SessionManager):
    """A template is kept with the session and found with it again."""
    template = {
        "system_prompt": "You are a helpful {language} assistant.",
        "context": {"language": "zh-CN", "tone": "friendly"},
    }
    made = await sessions.create(user_id="user_123", template=template)
    assert (await sessions.get(made.session_id)).session.template == template


async def test_second_document_locks_a_session(sessions: SessionManager, chat: ChatService):
    """Fifty read-modify-writes under the lock lose nothing, and a turn waits for the lock."""
    session_id = (await sessions.create()).session_id

    async def count() -> None:
        async with sessions.lock(session_id) as session:
            seen = session.metadata.get("count", 0)
            await sessions.update_metadata(session_id, {"count": seen + 1})

    waits = [asyncio.ensure_future(count()) for _ in range(4)]
    await asyncio.gather(*waits)
    for _ in range(46):
        await count()
    assert (await sessions.get(session_id)).session.metadata == {"count": 50}
    locked, unlock = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with sessions.lock(session_id):
            locked.set()
            await unlock.wait()

    holder = asyncio.ensure_future(hold())
    await locked.wait()
    flight = await chat.begin(ChatRequest(session_id=session_id, message="hello"))
    assert (await chat.active(SessionKey("", session_id))).waiting == (flight.turn_id,)
    unlock.set()
    await holder
    await flight.wait_ended()
    flight.leave()
    assert (await sessions.get(session_id)).session.turn_count == 1


async def test_second_document_works_in_batches(sessions: SessionManager):
    """Many at once, made side by side or in one commit, and deleted together."""
    side_by_side = await asyncio.gather(
        *(sessions.create(user_id="u", agent_id="assistant") for _ in range(5))
    )
    assert len({view.session_id for view in side_by_side}) == 5
    assert await sessions.delete_many([view.session_id for view in side_by_side]) == 5


async def test_second_document_allows_a_subclass_that_caches(pool: Runtime):
    """A program may put a cache of its own before the manager."""

    class Cached(SessionManager):
        cache: ClassVar[dict[str, SessionView]] = {}

        async def get(self, ref, user_id=None):
            key = str(ref)
            if key not in self.cache:
                self.cache[key] = await super().get(ref, user_id)
            return self.cache[key]

    cached = Cached.__new__(Cached)
    cached.__dict__.update(pool.sessions.__dict__)
    session_id = (await cached.create()).session_id
    assert await cached.get(session_id) is await cached.get(session_id)


async def test_second_document_counts_and_cleans_up(sessions: SessionManager, chat: ChatService):
    """Totals, actives, expired ones and durations; a cleanup purges nothing that is alive."""
    session_id = (await sessions.create(user_id="user_123", ttl_s=1)).session_id
    await chat.chat(session_id, "hello")
    stats = await sessions.stats()
    assert (stats.total, stats.active, stats.turns, stats.turns_failed) == (1, 1, 1, 0)
    assert stats.tokens > 0
    assert await sessions.cleanup() == (0, 0)


async def test_second_document_keeps_users_apart_and_resumes(sessions: SessionManager):
    """Another user's session is as good as none; the newest fitting one is resumed, else a new one made."""
    session_id = (await sessions.create(user_id="alice")).session_id
    with pytest.raises(SessionNotFound):
        await sessions.get(session_id, user_id="bob")
    resumed, is_new = await sessions.resume(user_id="alice", agent_id="assistant")
    assert (resumed.session_id, is_new) == (session_id, False)
    _, is_new = await sessions.resume(user_id="bob")
    assert is_new


# -- first and fourth document: chats of users and windows, a pool of agents ---------------


async def test_first_document_keeps_windows_apart(sessions: SessionManager, chat: ChatService):
    """One user's two windows are two conversations with a history each."""
    desktop = (await sessions.create(user_id="alice", window_id="desktop")).session_id
    mobile = (await sessions.create(user_id="alice", window_id="mobile")).session_id
    await chat.chat(desktop, "My name is Alice")
    await chat.chat(mobile, "My name is Carol")
    assert "Alice" in (await chat.chat(desktop, "What is my name?")).reply
    assert [turn.input for turn in (await sessions.history(mobile)).turns] == ["My name is Carol"]


async def test_fourth_document_streams_and_shares_a_pool(pool: Runtime, chat: ChatService):
    """Events of a turn in order; the agent stays live, is counted, and is cleaned up."""
    events = [event async for event in chat.stream("s1", "hello")]
    assert isinstance(events[0], TurnStarted)
    assert isinstance(events[-1], TurnFinished)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == events[-1].reply
    assert pool.agents.stats().idle == 1
    assert pool.agents.cleanup_oldest(1).removed == 1
    assert (await chat.chat("s1", "again")).activation == "restored"


# -- fifth document: state of applications, users and sessions, and events -------------------


async def test_fifth_document_merges_three_states(sessions: SessionManager):
    """Initial state, the user's and the application's; another session of the user shares the latter two."""
    made = await sessions.create(
        app_name="my-agent", user_id="user123", state={"language": "zh-CN", "theme": "dark"}
    )
    await sessions.patch_shared(StateScope("my-agent"), {"version": 2})
    await sessions.patch_shared(StateScope("my-agent", "", "user123"), {"name": "Alice"})
    await sessions.patch_state(made.session_id, {"theme": None, "topic": "weather"})
    _, merged = await sessions.merged_state(made.session_id)
    assert merged == {"app:version": 2, "user:name": "Alice", "language": "zh-CN", "topic": "weather"}
    other = await sessions.create(app_name="my-agent", user_id="user123")
    _, merged = await sessions.merged_state(other.session_id)
    assert merged == {"app:version": 2, "user:name": "Alice"}
    await sessions.delete(made.session_id)
    assert (await sessions.get_shared(StateScope("my-agent", "", "user123"))).values == {"name": "Alice"}


async def test_no_increment_is_lost(sessions: SessionManager):
    """Fifty sessions of one user add a hundred times each to one counter, retrying by its revision."""
    scope, some_at_once = StateScope("default", "", "alice"), asyncio.Semaphore(4)

    async def increment() -> None:
        for _ in range(100):
            async with some_at_once:
                while True:
                    found = await sessions.get_shared(scope)
                    patch = {"count": found.values.get("count", 0) + 1}
                    try:
                        await sessions.patch_shared(scope, patch, expected_rev=found.rev)
                        break
                    except PreconditionFailed:
                        continue

    await asyncio.gather(*(increment() for _ in range(50)))
    found = await sessions.get_shared(scope)
    assert (found.values, found.rev) == ({"count": 5000}, 5000)


async def test_fifth_document_filters_events(sessions: SessionManager, chat: ChatService):
    """The last ten, those since a time, those of a kind."""
    session_id = (await sessions.create()).session_id
    for number in range(4):
        await chat.chat(session_id, f"message {number}")
    await sessions.patch_state(session_id, {"topic": "weather"})
    everything = await sessions.events(session_id, limit=200)
    assert await sessions.events(session_id, limit=10) == everything[-10:]
    hour_ago = (int(time.time()) - 3600) * 1000
    assert await sessions.events(session_id, since=hour_ago, limit=200) == everything
    assert await sessions.events(session_id, since=hour_ago + 7_200_000) == ()
    (fact,) = await sessions.events(session_id, kinds=frozenset([StateChanged]))
    assert fact.event == StateChanged({"topic": "weather"})


async def test_what_belongs_to_a_branch_goes_back_with_it(sessions: SessionManager, chat: ChatService):
    """After a rewind the session's state is what it was then; a fork goes its own way."""
    session_id = (await sessions.create(state={"step": 0})).session_id
    for step in (1, 2):
        await sessions.patch_state(session_id, {"step": step})
        await chat.chat(session_id, f"step {step}")
    fork = await sessions.fork(session_id)
    back = await sessions.rewind(session_id, Back(1))
    assert (back.session.state, fork.session.state) == ({"step": 1}, {"step": 2})
    await sessions.update(fork.session_id, SessionChange(title="Another way"))
    assert (await sessions.get(session_id)).session.title is None
