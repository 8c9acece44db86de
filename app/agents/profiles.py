"""The kinds of agents there are, and what a session makes of its profile."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from app.domain.catalog import AgentProfile
from app.domain.session import DEFAULT_AGENT_ID, Session
from app.domain.state import Surroundings

_PLACEHOLDER: Final = re.compile(r"\{(user:|app:)?([^\s{}:]{1,256}+)\}")
_NOTHING: Final = Surroundings()


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


def render_prompt(profile: AgentProfile, session: Session, shared: Surroundings | None = None) -> str:
    """Return the system prompt for ``session``: its template's own, else its profile's.

    ``{key}`` stands for a key of the session's state, else of its template's ``context``;
    ``{user:key}`` and ``{app:key}`` for keys of ``shared``. A key begins like an identifier, in any
    script, and goes on with ``-`` and ``.`` too: braces around anything else are text. What is
    missing or ``null`` is empty, texts stand as they are, other values as JSON. Values are
    never read again: a placeholder in one is text.
    """
    around = shared or _NOTHING
    context = (session.template or {}).get("context") or {}
    sources = {"user:": (around.user.values,), "app:": (around.app.values,), None: (session.state, context)}

    def value_of(found: re.Match[str]) -> str:
        scope, key = found.groups()
        if not _is_key(key):
            return found[0]
        values = (source.get(key) for source in sources[scope])
        return _to_text(next((value for value in values if value is not None), ""))

    return _PLACEHOLDER.sub(value_of, _prompt_of(profile, session))


def names_shared(profile: AgentProfile, session: Session) -> bool:
    """Whether the session's prompt has a placeholder for state of its user or application."""
    prompt = _prompt_of(profile, session)
    # Asked before every turn: two searches for plain text are cheaper than remembering the answer.
    if "{user:" not in prompt and "{app:" not in prompt:
        return False
    return any(found[1] and _is_key(found[2]) for found in _PLACEHOLDER.finditer(prompt))


def _prompt_of(profile: AgentProfile, session: Session) -> str:
    return str((session.template or {}).get("system_prompt") or profile.system_prompt)


def _is_key(text: str) -> bool:
    return text[0] not in "-." and text.replace("-", "_").replace(".", "_").isidentifier()


def _to_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def pick_tools(profile: AgentProfile, template: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the names of a session's tools: those of its profile that its template did not leave out."""
    chosen = (template or {}).get("capabilities")
    return profile.tools if chosen is None else tuple(name for name in profile.tools if name in chosen)


def has_tools(profile: AgentProfile, template: Mapping[str, Any] | None) -> bool:
    """Whether the profile has every tool that the template names."""
    return all(name in profile.tools for name in (template or {}).get("capabilities") or ())


def pick_params(profile: AgentProfile, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the model is asked: as the profile says, but for what the session chose itself."""
    return {**profile.params, **params}
