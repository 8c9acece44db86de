"""The kinds of agents there are, and what a session makes of its profile."""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from app.domain.catalog import AgentProfile
from app.domain.session import DEFAULT_AGENT_ID

_PLACEHOLDER: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


def with_revision(profile: AgentProfile) -> AgentProfile:
    """Return ``profile`` with a revision that follows from its other fields: it changes when they do."""
    plain = replace(profile, revision=0)
    return replace(profile, revision=zlib.crc32(repr(plain).encode()))


def builtin_profiles(tools: Sequence[str] = ()) -> tuple[AgentProfile, ...]:
    """Return the profiles that are there without any configuration, each with these tools."""
    return (
        with_revision(
            AgentProfile(
                agent_id=DEFAULT_AGENT_ID,
                name="Assistant",
                description="A helpful assistant for conversations of any kind.",
                system_prompt="You are a helpful assistant.",
                tools=tuple(tools),
            )
        ),
    )


def render_prompt(profile: AgentProfile, template: Mapping[str, Any] | None) -> str:
    """Return the system prompt for a session.

    Its ``template`` may bring a ``system_prompt`` of its own and a ``context`` whose values
    take the place of ``{key}``. A placeholder without a value stays as it is written.
    """
    if not template:
        return profile.system_prompt
    prompt = str(template.get("system_prompt") or profile.system_prompt)
    values = template.get("context") or {}
    return _PLACEHOLDER.sub(lambda m: str(values[m[1]]) if m[1] in values else m[0], prompt)


def pick_tools(profile: AgentProfile, template: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the names of a session's tools: those of its profile that its template did not leave out."""
    chosen = (template or {}).get("capabilities")
    return profile.tools if chosen is None else tuple(name for name in profile.tools if name in chosen)


def pick_params(profile: AgentProfile, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the model is asked: as the profile says, but for what the session chose itself."""
    return {**profile.params, **params}
