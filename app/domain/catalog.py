"""What clients may choose from."""

import re
from dataclasses import dataclass, field
from typing import Final, Literal

from app.domain.turn import JsonObject

_LIMITED: Final = re.compile(r"(last|tokens):([1-9][0-9]{0,8})", re.ASCII)


@dataclass(frozen=True, slots=True)
class ContextPolicy:
    """How much of a session's path the model is sent: all, the last messages, or some tokens of them.

    ``limit`` counts messages (``last``) or estimated tokens (``tokens``).
    """

    unit: Literal["all", "last", "tokens"] = "all"
    limit: int = 0


WHOLE_CONTEXT: Final = ContextPolicy()


def parse_context_policy(text: str) -> ContextPolicy:
    """Return the policy that ``all``, ``last:<n>`` or ``tokens:<n>`` names.

    Raises:
        ValueError: it is none of these; the message says what is allowed.
    """
    if text == "all":
        return WHOLE_CONTEXT
    found = _LIMITED.fullmatch(text)
    if found is None:
        raise ValueError("must be all, last:<n> or tokens:<n>, n from 1 to 999999999")
    return ContextPolicy("last" if found[1] == "last" else "tokens", int(found[2]))


@dataclass(frozen=True, slots=True)
class AgentProfile:
    """A configured kind of agent. ``revision`` changes when its configuration does.

    A session's own provider, model and params go before the profile's. ``tools`` are names.
    ``None`` leaves it to the server's default.
    """

    agent_id: str
    name: str
    description: str
    system_prompt: str
    provider: str | None = None
    model: str | None = None
    tools: tuple[str, ...] = ()
    revision: int = 0
    params: JsonObject = field(default_factory=dict)
    context_policy: ContextPolicy | None = None
    max_tool_iterations: int | None = None


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """One model of one provider; ``model`` is ``"*"`` where the provider takes any name."""

    provider: str
    model: str
    is_default: bool
