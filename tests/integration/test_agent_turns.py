"""Whole turns against a model server: isolation, cancellation, connections."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import pytest

from app.domain.errors import ModelError
from app.domain.events import TextDelta, ToolCalled, TurnEvent
from app.domain.turn import ToolResults, text_of
from app.models.registry import ModelRegistry
from app.ports import LiveAgent
from tests.modelserver import ModelServer
from tests.unit.agents.making import make_agent, run, server_models, until


@pytest.fixture(scope="module")
def model_server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def server(model_server: ModelServer) -> ModelServer:
    model_server.reset()
    return model_server


@pytest.fixture(params=["lean", "stock"])
async def models(request: pytest.FixtureRequest, server: ModelServer) -> AsyncIterator[ModelRegistry]:
    registry = server_models(server, request.param)
    yield registry
    await registry.close()


class Running:
    """A turn in a task of its own, as the turn engine runs it."""

    def __init__(self, agent: LiveAgent, message: str, wanted: type[TurnEvent]) -> None:
        self.agent = agent
        self.events: list[TurnEvent] = []
        self._reached = asyncio.Event()
        self._wanted = wanted
        self.task = asyncio.create_task(agent.run(message, self._emit))

    def _emit(self, event: TurnEvent) -> None:
        self.events.append(event)
        if isinstance(event, self._wanted):
            self._reached.set()

    async def reach(self) -> None:
        """Return when the first event of the wanted kind has come."""
        async with asyncio.timeout(5):
            await self._reached.wait()

    async def end(self) -> None:
        """Return when the task has ended, as it must, with a cancellation."""
        await asyncio.wait({self.task}, timeout=2)
        assert self.task.cancelled()


async def test_sessions_do_not_see_each_other(models: ModelRegistry, server: ModelServer) -> None:
    """What arrives at the model is one session's own history, with fifty running at once."""

    async def talk(name: str) -> list[str]:
        agent = make_agent(models)
        for i in range(3):
            answer, _ = await run(agent, f"{name} {i}")
        heard = json.loads(text_of(answer.messages))
        return [t for t, role in zip(heard["texts"], heard["roles"], strict=True) if role == "user"]

    heard = await asyncio.gather(*(talk(f"session-{n}") for n in range(50)))
    assert heard == [[f"session-{n} {i}" for i in range(3)] for n in range(50)]


@pytest.mark.parametrize("how", ["token", "task", "both"])
@pytest.mark.parametrize("step", [{"mode": "stall_mid"}, {"mode": "stall_mid", "comments": True}])
async def test_cancelling_in_the_middle_closes_the_connection(
    models: ModelRegistry, server: ModelServer, how: str, step: dict[str, object]
) -> None:
    """The turn ends at once, and the model's end sees its client gone within a second."""
    server.script(step)
    turn = Running(make_agent(models), "hello", TextDelta)
    await turn.reach()
    assert server.stats()["streaming"] == 1
    cancel(turn, how)
    await turn.end()
    await until(lambda: server.stats() == {"requests": 1, "open": 0, "streaming": 0, "aborted": 1}, 1)


@pytest.mark.parametrize("how", ["token", "task", "both"])
@pytest.mark.parametrize("mode", ["never_headers", "stall_first"])
async def test_cancelling_before_the_first_token(
    models: ModelRegistry, server: ModelServer, how: str, mode: str
) -> None:
    """A model that has not answered yet is let go of just as fast."""
    server.script({"mode": mode})
    turn = Running(make_agent(models), "hello", TextDelta)
    await until(lambda: server.stats()["streaming"] == 1)
    cancel(turn, how)
    await turn.end()
    await until(lambda: server.stats()["aborted"] == 1, 1)


@pytest.mark.parametrize("how", ["token", "task", "both"])
async def test_cancelling_a_tool_that_hangs(models: ModelRegistry, server: ModelServer, how: str) -> None:
    """The tool is stopped, the turn ends, and the model is not asked again (AutoGen #7956)."""
    started, stopped = asyncio.Event(), asyncio.Event()

    async def clock() -> str:
        """Tell the time, never."""
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return "never"

    server.script({"mode": "tools"})
    turn = Running(make_agent(models, clock), "What time is it?", ToolCalled)
    async with asyncio.timeout(5):
        await started.wait()
    cancel(turn, how)
    await turn.end()
    async with asyncio.timeout(1):
        await stopped.wait()
    assert len(server.requests()) == 1


async def test_no_tool_begins_after_a_cancel(models: ModelRegistry, server: ModelServer) -> None:
    """A cancel that comes as the model asks for tools keeps them from starting."""
    begun = []

    async def clock() -> str:
        """Tell the time."""
        begun.append(True)
        return "noon"

    agent = make_agent(models, clock)

    def emit(event: TurnEvent) -> None:
        if isinstance(event, ToolCalled):
            agent.cancel()

    server.script({"mode": "tools"})
    with pytest.raises(asyncio.CancelledError):
        await agent.run("What time is it?", emit)
    assert begun == []


def cancel(turn: Running, how: str) -> None:
    if how in {"token", "both"}:
        turn.agent.cancel()
    if how in {"task", "both"}:
        turn.task.cancel()


async def test_a_failure_in_the_reader_closes_the_connection(
    models: ModelRegistry, server: ModelServer
) -> None:
    """Whatever breaks a turn while the model streams, the stream does not outlive it."""
    server.script({"mode": "stall_mid"})

    def emit(event: TurnEvent) -> None:
        raise ModelError

    with pytest.raises(ModelError) as caught:
        await make_agent(models).run("hello", emit)
    await until(lambda: server.stats()["aborted"] == 1, 1)
    assert caught.tb is not None  # and not because nobody held its frames any more


async def test_a_tool_that_takes_too_long_is_told_to_the_model(
    models: ModelRegistry, server: ModelServer
) -> None:
    """The turn goes on with an error in the place of the result."""

    async def clock() -> str:
        """Tell the time, never."""
        await asyncio.Event().wait()
        return "never"

    server.script({"mode": "tools", "repeat": 2})
    answer, _ = await run(make_agent(models, clock), "What time is it?")
    results = answer.messages[2]
    assert isinstance(results, ToolResults)
    assert results.results[0].is_error
    assert "longer than 1 s" in server.requests()[1]["messages"][-1]["content"]


@pytest.mark.parametrize(
    "step",
    [
        {"mode": "think", "text": "So it is."},
        {"mode": "reasoning", "text": "So it is."},
        {"mode": "tools", "say": "Let me see.", "reasoning": "hm", "repeat": 2},
    ],
)
async def test_a_warm_agent_goes_on_as_a_restored_one(
    models: ModelRegistry, server: ModelServer, step: dict[str, object]
) -> None:
    """After a turn both send the model the same, and neither sends its reasoning back."""

    async def clock() -> str:
        """Tell the time."""
        return "noon"

    server.script(step)
    warm = make_agent(models, clock)
    answer, _ = await run(warm, "first")
    restored = make_agent(models, clock, messages=answer.messages)
    server.reset()
    await run(warm, "second")
    await run(restored, "second")
    sent_warm, sent_restored = server.requests()
    assert sent_warm == sent_restored
    assert len(sent_warm["messages"]) == len(answer.messages) + 2
    assert "think" not in str(sent_warm)
    assert "hm" not in str(sent_warm)


async def test_a_cancel_without_a_turn_is_harmless(models: ModelRegistry) -> None:
    """Before and after a turn nothing is there to stop."""
    agent = make_agent(models)
    agent.cancel()
    await run(agent, "hello")
    agent.cancel()
    await run(agent, "hello again")


async def test_closing_the_registry_closes_its_connections(
    models: ModelRegistry, server: ModelServer
) -> None:
    """After the shutdown no connection is open; closing again does nothing."""
    await run(make_agent(models), "hello")
    assert server.stats()["open"] == 1
    await models.close()
    await models.close()
    await until(lambda: server.stats()["open"] == 0, 1)
