"""What clients may choose from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AgentProfile:
    """A configured kind of agent. ``revision`` changes when its configuration does."""

    agent_id: str
    name: str
    description: str
    system_prompt: str
    provider: str | None = None
    model: str | None = None
    tools: tuple[str, ...] = ()
    revision: int = 0


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """One model of one provider; ``model`` is ``"*"`` where the provider takes any name."""

    provider: str
    model: str
    is_default: bool
