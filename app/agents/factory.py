"""Makes live agents: from a session's record to a model, a prompt and tools."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from app.agents.autogen import MAX_TOOL_ITERATIONS, AutogenAgent, Shell
from app.agents.profiles import (
    builtin_profiles,
    has_tools,
    names_shared,
    pick_params,
    pick_tools,
    render_prompt,
)
from app.agents.source import ModelSource
from app.agents.summary import ask_for_summary
from app.agents.tools import CachedWorkbench, ToolSource, to_tool
from app.domain.catalog import WHOLE_CONTEXT, AgentProfile, ContextPolicy, ModelOffer
from app.domain.errors import AgentNotFound, InvalidInput
from app.domain.session import Path, Session, Stamp
from app.domain.state import Surroundings
from app.domain.turn import Summary
from app.ports import LiveAgent

# ``autogen_core.events`` writes whole prompts at INFO, and so do the others at DEBUG.
# OpenTelemetry's API reports an error with a traceback whenever a generator ends in
# another task than it began in, which every cancelled turn does.
_QUIET: Final[Mapping[str, int]] = {
    "autogen_core": logging.WARNING,
    "autogen_core.events": logging.WARNING,
    "autogen_core.trace": logging.WARNING,
    "openai": logging.WARNING,
    "httpx2": logging.WARNING,
    "opentelemetry.context": logging.CRITICAL,
}


class AutogenFactory:
    """Implements ``app.ports.AgentFactory``.

    ``profiles`` left out are the built-in ones; ``tools`` are what profiles may name in
    theirs; ``context_policy`` is for profiles without one of their own. Everything that can
    be shared is: one workbench per set of tools, one model client per (provider, model,
    params). Making a factory sets the libraries' log levels.
    """

    def __init__(
        self,
        models: ModelSource,
        profiles: Sequence[AgentProfile] | None = None,
        *,
        tools: Sequence[ToolSource] = (),
        context_policy: ContextPolicy = WHOLE_CONTEXT,
        tool_timeout_s: float = 120.0,
        max_tool_output_chars: int = 65_536,
    ) -> None:
        self._models = models
        self._tools = {tool.name: tool for tool in map(to_tool, tools)}
        profiles = builtin_profiles(tuple(self._tools)) if profiles is None else profiles
        self._profiles = {profile.agent_id: profile for profile in profiles}
        self._context_policy = context_policy
        self._tool_timeout_s = tool_timeout_s
        self._max_tool_output_chars = max_tool_output_chars
        self._workbenches: dict[tuple[str, ...], CachedWorkbench] = {}
        for profile in profiles:
            if missing := [name for name in profile.tools if name not in self._tools]:
                raise ValueError(f"agent {profile.agent_id}: there is no tool {missing[0]}")
        quieten_libraries()

    def profiles(self) -> tuple[AgentProfile, ...]:
        return tuple(self._profiles.values())

    def offers(self) -> tuple[ModelOffer, ...]:
        return self._models.offers()

    def check(self, session: Session) -> None:
        self.model_of(session)
        if not has_tools(self._profile(session), session.template):
            raise InvalidInput("template.capabilities", "must name nothing but tools of the session's agent")

    def names_shared(self, session: Session) -> bool:
        return names_shared(self._profile(session), session)

    def model_of(self, session: Session) -> tuple[str, str]:
        """Return the (provider, model) of the session, else of its profile, else the default.

        A session that names another provider than its profile does not get the profile's
        model, which that provider would not know.
        """
        profile = self._profile(session)
        provider = session.provider or profile.provider
        model = session.model
        if model is None and provider == profile.provider:
            model = profile.model
        return self._models.resolve(provider, model)

    def stamp_of(self, session: Session, shared: Surroundings | None = None) -> Stamp:
        return Stamp(
            session.head,
            session.note,
            session.rev,
            self._profile(session).revision,
            session.state_rev,
            None if shared is None else shared.revs,
            session.uid,
        )

    def build(self, session: Session, path: Path, shared: Surroundings | None = None) -> LiveAgent:
        stamp = replace(self.stamp_of(session, shared), head=path.head, note=path.note)
        return AutogenAgent(stamp, path, self._shell(session, shared))

    def refit(self, agent: LiveAgent, session: Session, shared: Surroundings | None = None) -> None:
        assert isinstance(agent, AutogenAgent)
        stamp = replace(self.stamp_of(session, shared), head=agent.stamp.head, note=agent.stamp.note)
        agent.refit(stamp, self._shell(session, shared))

    async def summarise(self, session: Session, path: Path) -> Summary:
        """Have the session's model summarise ``path``; a cancellation closes the connection to it."""
        params = pick_params(self._profile(session), session.params)
        # Made for answers: they would cut a summary short.
        kept = {name: value for name, value in params.items() if name not in ("max_tokens", "stop")}
        return await ask_for_summary(self._models.client_for(*self.model_of(session), kept), path)

    def _shell(self, session: Session, shared: Surroundings | None) -> Shell:
        profile = self._profile(session)
        return Shell(
            client=self._models.client_for(*self.model_of(session), pick_params(profile, session.params)),
            workbench=self._workbench(pick_tools(profile, session.template)),
            system_prompt=render_prompt(profile, session, shared),
            policy=profile.context_policy or self._context_policy,
            max_tool_iterations=profile.max_tool_iterations or MAX_TOOL_ITERATIONS,
        )

    def _profile(self, session: Session) -> AgentProfile:
        profile = self._profiles.get(session.agent_id)
        if profile is None:
            raise AgentNotFound
        return profile

    def _workbench(self, names: tuple[str, ...]) -> CachedWorkbench:
        if names not in self._workbenches:
            self._workbenches[names] = CachedWorkbench(
                [self._tools[name] for name in names],
                timeout_s=self._tool_timeout_s,
                max_output_chars=self._max_tool_output_chars,
            )
        return self._workbenches[names]


def quieten_libraries() -> None:
    """Keep prompts, and noise about things that are as they should be, out of the log."""
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
