"""What makes and runs the live agents."""

from collections.abc import Callable
from typing import Protocol

from app.domain.catalog import AgentProfile, ModelOffer
from app.domain.events import TurnEvent
from app.domain.session import Path, Session, Stamp
from app.domain.state import Surroundings
from app.domain.turn import Answer, Summary

Emit = Callable[[TurnEvent], None]
"""Takes an event of the running turn; never waits, never raises."""


class LiveAgent(Protocol):
    """The in-memory agent of one session. One turn at a time; the pool's lease sees to that.

    ``stamp`` says what it was built from. After a turn that did not commit the
    agent is dropped, never repaired.
    """

    stamp: Stamp

    @property
    def estimated_bytes(self) -> int: ...

    @property
    def estimated_tokens(self) -> int:
        """About how many tokens its context takes, all of it."""

    async def run(self, message: str, emit: Emit) -> Answer:
        """Carry out one turn and return what it added to the context.

        Emits text, reasoning and tool events while it runs. Text deltas joined
        equal the model's answer. When cancelled, or after ``cancel()``, no tool call
        begins and the connection to the model is closed.

        Raises:
            ModelUnavailable, ModelRateLimited, ModelError: the model failed.
        """

    def cancel(self) -> None:
        """Ask the running turn to stop; harmless without one."""


class AgentFactory(Protocol):
    """Makes live agents. Plain calls: building takes some 30 µs and waits for nothing."""

    def profiles(self) -> tuple[AgentProfile, ...]:
        """Return what a session's ``agent_id`` may name."""

    def offers(self) -> tuple[ModelOffer, ...]:
        """Return what a session's ``provider`` and ``model`` may name."""

    def check(self, session: Session) -> None:
        """Refuse a session that could not run.

        Raises:
            AgentNotFound, UnknownModel: its profile, provider or model is not offered.
            InvalidInput: its template names a capability that its profile has not.
        """

    def names_shared(self, session: Session) -> bool:
        """Whether the session's prompt names keys of its user's or application's state."""

    def model_of(self, session: Session) -> tuple[str, str]:
        """Return the (provider, model) that the session's next turn would use."""

    def stamp_of(self, session: Session, shared: Surroundings | None = None) -> Stamp:
        """Return the stamp that an agent for ``session`` must carry to be used as it is.

        ``shared`` is given where ``names_shared``, here and in what follows.
        """

    def build(self, session: Session, path: Path, shared: Surroundings | None = None) -> LiveAgent:
        """Make the live agent for ``session`` with the context ``path``."""

    def refit(self, agent: LiveAgent, session: Session, shared: Surroundings | None = None) -> None:
        """Keep the agent's context and rebuild the shell around it: prompt, model, tools."""

    async def summarise(self, session: Session, path: Path) -> Summary:
        """Have the session's model summarise ``path``.

        Raises:
            ModelUnavailable, ModelRateLimited, ModelError: the model failed, or said nothing.
        """
