"""Sessions, agents and model sources for tests of the agents, here and in ``integration``."""

import asyncio
from typing import Any

from app.agents.factory import AutogenFactory
from app.agents.profiles import with_revision
from app.domain.catalog import AgentProfile
from app.domain.events import TextDelta, TurnEvent
from app.domain.ids import SessionKey
from app.domain.session import Path, Session
from app.domain.turn import Answer, ContextMessage
from app.models.providers import demo_provider, make_provider
from app.models.registry import ClientKind, ModelRegistry
from app.ports import LiveAgent
from tests.modelserver import ModelServer

KEY = "sk-SECRET-0123456789"
PLAIN = with_revision(AgentProfile("assistant", "Assistant", "", "You are a helpful assistant."))


def make_session(**changes: Any) -> Session:
    values = {
        "key": SessionKey("", "s1"),
        "uid": "u1",
        "app_name": "default",
        "agent_id": "assistant",
        "created_at": 0,
        "updated_at": 0,
        "last_accessed": 0,
        "expires_at": None,
    }
    return Session(**values | changes)


def make_path(*messages: ContextMessage, stored_bytes: int = 0) -> Path:
    return Path("head", None, messages, stored_bytes)


def demo_models() -> ModelRegistry:
    return ModelRegistry([demo_provider()], "demo")


def server_models(server: ModelServer, kind: ClientKind = "lean", **limits: Any) -> ModelRegistry:
    """Return a registry whose one provider ``scripted`` is ``server``; impatient."""
    provider = make_provider("scripted", base_url=server.base_url, model="m", models=["m2"], api_key=KEY)
    quick = {"first_event_timeout_s": 5.0, "idle_timeout_s": 5.0, "retry_base_s": 0.001}
    return ModelRegistry([provider], "scripted", client_kind=kind, **quick | limits)


def make_agent(models: ModelRegistry, *tools: Any, messages: tuple[ContextMessage, ...] = ()) -> LiveAgent:
    """Return an agent with all of ``tools`` whose context is ``messages``."""
    names = tuple(tool.__name__ for tool in tools)
    profile = with_revision(AgentProfile("assistant", "A", "", "You are a helpful assistant.", tools=names))
    factory = AutogenFactory(models, [profile], tools=tools, tool_timeout_s=1.0)
    return factory.build(make_session(), make_path(*messages))


async def run(agent: LiveAgent, message: str) -> tuple[Answer, list[TurnEvent]]:
    """Return the answer to ``message`` and the events on its way."""
    events: list[TurnEvent] = []
    answer = await agent.run(message, events.append)
    return answer, events


def text_of_events(events: list[TurnEvent]) -> str:
    return "".join(e.text for e in events if isinstance(e, TextDelta))


async def until(condition: Any, seconds: float = 5.0) -> None:
    """Return when ``condition()``, which asks another process, holds; fail after ``seconds``."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  another process cannot set an event of ours
            await asyncio.sleep(0)  # the asking takes its time
