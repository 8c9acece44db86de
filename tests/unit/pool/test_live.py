"""How an agent keeps up with its session and with the shared state that its prompt names."""

from dataclasses import replace

import pytest

from app.domain.errors import StoreUnavailable
from app.domain.state import SharedState, StateScope, Surroundings
from app.pool.live import Activator, read_surroundings
from tests.fakes import FakeFactory, FakeStore, Fault, fill, make_session

APP = StateScope("agentpool")
USER = StateScope("agentpool", "", "ann")
SESSION = make_session(user_id="ann")


async def made(*, names_shared: bool = True) -> tuple[Activator, FakeStore, FakeFactory]:
    store, factory = FakeStore(), FakeFactory()
    factory.has_shared_prompt = names_shared
    await fill(store)
    await store.inner.create_session(SESSION)
    return Activator(store, factory), store, factory


async def test_a_plain_session_reads_no_shared_state() -> None:
    """Its agent is used as it is, after the calls that there always were."""
    activator, store, factory = await made(names_shared=False)
    agent, session = await activator.activate(SESSION.key)
    assert await activator.fit(agent, session) is agent
    assert store.calls == {"find_session": 1, "load_path": 1}
    assert (factory.refits, agent.stamp.shared) == (0, None)


async def test_a_turn_reads_the_shared_state_once() -> None:
    """The agent is built without it and refitted with it; the next turn finds it as it should be."""
    activator, store, factory = await made()
    await store.inner.patch_shared(USER, {"name": "Ann"}, 0)
    agent, session = await activator.activate(SESSION.key)
    assert store.calls["get_shared"] == 0
    assert await activator.fit(agent, session) is agent
    assert agent.shared == Surroundings(user=SharedState({"name": "Ann"}, 1))
    assert (store.calls["get_shared"], store.calls["load_path"], factory.refits) == (2, 1, 1)
    assert await activator.fit(agent, session) is agent
    assert factory.refits == 1


@pytest.mark.parametrize("scope", [APP, USER])
async def test_a_change_of_shared_state_counts_from_the_next_turn(scope: StateScope) -> None:
    """The agent keeps its context and gets the new values."""
    activator, store, factory = await made()
    agent, session = await activator.activate(SESSION.key)
    await activator.fit(agent, session)
    await store.inner.patch_shared(scope, {"x": 1}, 0)
    assert await activator.fit(agent, session) is agent
    assert {"x": 1} in (agent.shared.app.values, agent.shared.user.values)
    assert (factory.refits, store.calls["load_path"]) == (2, 1)


async def test_a_rebuilt_agent_has_the_shared_state_at_once() -> None:
    """Where the head has moved, one reading of it goes into the new agent."""
    activator, store, factory = await made()
    await store.inner.patch_shared(APP, {"motto": "x"}, 0)
    agent, session = await activator.activate(SESSION.key)
    agent.stamp = replace(agent.stamp, head="elsewhere")
    other = await activator.fit(agent, session)
    assert other is not agent
    assert other.shared.app.values == {"motto": "x"}
    assert (store.calls["get_shared"], factory.refits) == (2, 0)


async def test_an_agent_is_as_before_when_shared_state_cannot_be_read() -> None:
    """The turn fails, and nothing else."""
    activator, store, factory = await made()
    agent, session = await activator.activate(SESSION.key)
    before = agent.stamp
    store.plan("get_shared", Fault(), Fault(error=StoreUnavailable()))
    with pytest.raises(StoreUnavailable):
        await activator.fit(agent, session)
    assert (agent.stamp, factory.refits) == (before, 0)


async def test_surroundings_are_those_of_the_application_and_the_user() -> None:
    """Of this owner's user in this application; a session without a user has the application's alone."""
    _, store, _ = await made()
    for scope in (
        APP,
        USER,
        StateScope("other"),
        StateScope("other", "", "ann"),
        StateScope("agentpool", "owner", "ann"),
        StateScope("agentpool", "", "bob"),
    ):
        await store.inner.patch_shared(scope, {"of": list(scope)}, 0)
    found = await read_surroundings(store, SESSION)
    assert (found.app.values, found.user.values) == ({"of": list(APP)}, {"of": list(USER)})
    alone = await read_surroundings(store, make_session())
    assert alone == Surroundings(app=found.app)
    assert store.calls["get_shared"] == 3
