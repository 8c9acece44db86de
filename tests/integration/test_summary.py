"""Having a real client's model sum up a path: what goes over the wire, and how it may end."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from app.agents.factory import AutogenFactory
from app.domain.errors import ModelError, ModelRateLimited, ModelUnavailable
from app.domain.turn import (
    AssistantText,
    ToolCall,
    ToolCalls,
    ToolResult,
    ToolResults,
    UserText,
)
from app.models.registry import ModelRegistry
from tests.modelserver import ModelServer
from tests.unit.agents.making import make_path, make_session, server_models, until

PATH = make_path(
    UserText("Add 1 and 1"),
    ToolCalls((ToolCall("c", "add", '{"a": 1, "b": 1}'),)),
    ToolResults((ToolResult("c", "add", "2"),)),
    AssistantText("It is 2."),
)


@pytest.fixture(scope="module")
def model_server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def server(model_server: ModelServer) -> ModelServer:
    model_server.reset()
    return model_server


@pytest.fixture(params=["lean", "stock"])
async def factory(request: pytest.FixtureRequest, server: ModelServer) -> AsyncIterator[AutogenFactory]:
    registry: ModelRegistry = server_models(server, request.param)
    yield AutogenFactory(registry)
    await registry.close()


async def test_one_request_without_tools(factory: AutogenFactory, server: ModelServer) -> None:
    """Two messages, the session's model and params; the answer and its usage are the summary."""
    server.script({"mode": "think", "reasoning": "hm", "text": "They added 1 and 1: 2."})
    session = make_session(model="m2", params={"temperature": 0.5, "max_tokens": 5, "stop": ["2"]})
    summary = await factory.summarise(session, PATH)
    (request,) = server.requests()
    assert summary.text == "They added 1 and 1: 2."
    assert summary.usage.prompt_tokens > 0
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert (request["model"], request["temperature"], request["stream"]) == ("m2", 0.5, True)
    assert not {"tools", "tool_choice", "stop", "max_tokens", "max_completion_tokens"} & request.keys()


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ({"mode": "text", "text": "They ad", "finish": "length"}, ModelError),
        ({"mode": "text", "text": "They ad", "finish": "content_filter"}, ModelError),
        ({"mode": "text", "text": " \n"}, ModelError),
        ({"mode": "empty_text"}, ModelError),
        ({"mode": "cut", "text": "They"}, ModelError),
        (
            {"mode": "tools", "calls": [{"name": "add", "arguments": "{}", "id": "c"}], "force": True},
            ModelError,
        ),
        ({"mode": "status", "status": 400}, ModelError),
        ({"mode": "status", "status": 429, "repeat": 3}, ModelRateLimited),
        ({"mode": "status", "status": 503, "repeat": 3}, ModelUnavailable),
    ],
)
async def test_what_is_no_summary_is_an_error(
    factory: AutogenFactory, server: ModelServer, step: dict[str, Any], error: type[Exception]
) -> None:
    """A model that fails fails as in a turn, and half a summary is none; no connection stays open."""
    server.script(step)
    with pytest.raises(error) as caught:
        await factory.summarise(make_session(), PATH)
    assert caught.type is error
    await until(lambda: server.stats()["streaming"] == 0, 1)


@pytest.mark.parametrize("mode", ["never_headers", "stall_first", "stall_mid"])
async def test_cancelling_closes_the_connection(
    factory: AutogenFactory, server: ModelServer, mode: str
) -> None:
    """At once, wherever the model is."""
    server.script({"mode": mode})
    task = asyncio.create_task(factory.summarise(make_session(), PATH))
    await until(lambda: server.stats()["streaming"] == 1)
    task.cancel()
    await asyncio.wait({task}, timeout=2)
    assert task.cancelled()
    await until(lambda: server.stats()["aborted"] == 1, 1)
