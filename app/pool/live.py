"""How a live agent comes to be, and how it keeps up with its session.

A live agent is a cache of the stored path. Its stamp says what it was built
from; equal stamps mean equal content, since every turn has a fresh id.
"""

from dataclasses import dataclass

from app.domain.errors import SessionNotFound
from app.domain.ids import SessionKey
from app.domain.session import Session
from app.domain.state import SharedState, StateScope, Surroundings
from app.pool.slot import Choice
from app.ports import AgentFactory, LiveAgent, SessionStore


@dataclass(frozen=True, slots=True)
class Activator:
    """Builds live agents from the store."""

    store: SessionStore
    factory: AgentFactory

    async def activate(self, key: SessionKey) -> tuple[LiveAgent, Session]:
        """Read the session and its path, and build its agent; changes nothing when cancelled.

        Shared state is left to ``fit``, which every turn begins with and which must read it anyway.

        Raises:
            SessionNotFound, SnapshotUnreadable, StoreUnavailable, AgentNotFound, UnknownModel
        """
        session = await self.store.find_session(key)
        if session is None:
            raise SessionNotFound(session_id=key.session_id)
        return await self.rebuild(session), session

    def choice_of(self, session: Session) -> Choice:
        """Return what an agent for ``session`` is built for, as operators see it."""
        return session.agent_id, *self.factory.model_of(session)

    async def rebuild(self, session: Session, shared: Surroundings | None = None) -> LiveAgent:
        """Read the path to ``session.head`` and build the agent for it."""
        path = await self.store.load_path(session)
        return self.factory.build(session, path, shared)

    async def fit(self, agent: LiveAgent, session: Session) -> LiveAgent:
        """Return an agent that matches ``session`` and, where its prompt names any, the shared state.

        The same agent where that is possible.
        """
        shared = None
        if self.factory.names_shared(session):
            shared = await read_surroundings(self.store, session)
        wanted = self.factory.stamp_of(session, shared)
        if agent.stamp == wanted:
            return agent
        if (agent.stamp.head, agent.stamp.note) == (wanted.head, wanted.note):
            self.factory.refit(agent, session, shared)
            return agent
        return await self.rebuild(session, shared)


async def read_surroundings(store: SessionStore, session: Session) -> Surroundings:
    """Return the state of the session's application, and of its user if it has one."""
    app = await store.get_shared(StateScope(session.app_name))
    if session.user_id is None:
        return Surroundings(app, SharedState())
    scope = StateScope(session.app_name, session.key.owner, session.user_id)
    return Surroundings(app, await store.get_shared(scope))
