"""Chunks of shapes that nobody expects: each is taken for good or is a ``ModelError``, and nothing leaks."""

import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from app.domain.errors import ModelError
from app.domain.turn import text_of
from app.models.registry import ModelRegistry
from tests.modelserver import ModelServer
from tests.unit.agents.making import make_agent, run, server_models, until


def choice(delta: Any, finish: Any = None, **more: Any) -> Any:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **more}]}


def call(**part: Any) -> Any:
    return choice({"tool_calls": [{"index": 0, "id": "c", "type": "function", **part}]})


SHAPES: dict[str, Any] = {
    "null": None,
    "a number": 5,
    "a text": "hi",
    "a list": [],
    "an empty object": {},
    "choices null": {"choices": None},
    "choices an object": {"choices": {"a": 1}},
    "a choice null": {"choices": [None]},
    "a choice a text": {"choices": ["hi"]},
    "a choice without delta": {"choices": [{"index": 0}]},
    "delta null": choice(None),
    "delta a text": choice("hi"),
    "delta a list": choice([]),
    "content a number": choice({"content": 5}),
    "content a list": choice({"content": [{"type": "text", "text": "hi"}]}),
    "content an object": choice({"content": {"text": "hi"}}),
    "reasoning a number": choice({"reasoning_content": 5}),
    "reasoning an object": choice({"reasoning_content": {"a": 1}}),
    "tool calls an object": choice({"tool_calls": {"a": 1}}),
    "tool calls empty": choice({"tool_calls": []}),
    "a tool call null": choice({"tool_calls": [None]}),
    "a tool call empty": choice({"tool_calls": [{}]}),
    "a tool call without function": call(),
    "a tool call with function null": call(function=None),
    "a tool call with name null": call(function={"name": None, "arguments": "{}"}),
    "a tool call with a number for a name": call(function={"name": 5, "arguments": "{}"}),
    "a tool call with an object for arguments": call(function={"name": "clock", "arguments": {"a": 1}}),
    "a tool call with a text for an index": choice(
        {"tool_calls": [{"index": "x", "id": "c", "function": {"name": "clock", "arguments": "{}"}}]}
    ),
    "a tool call with a list for an index": choice(
        {"tool_calls": [{"index": [], "id": "c", "function": {"name": "clock", "arguments": "{}"}}]}
    ),
    "a tool call with a number for an id": choice(
        {"tool_calls": [{"index": 0, "id": 7, "function": {"name": "clock", "arguments": "{}"}}]}
    ),
    "two choices": {
        "choices": [*choice({"content": "hi"})["choices"], {"index": 1, "delta": {"content": "ho"}}]
    },
    "logprobs": choice({"content": "hi"}, logprobs={"content": [{"token": 5}]}),
    "finish of old": choice({"content": "hi"}, "function_call"),
    "model a number": choice({"content": "hi"}) | {"model": 5},
    "finish a number": choice({"content": "hi"}, 5),
    "finish an object": choice({"content": "hi"}, {"a": 1}),
    "usage a text": {"choices": [], "usage": "much"},
    "usage of texts": {"choices": [], "usage": {"prompt_tokens": "a", "completion_tokens": []}},
    "usage without numbers": {"choices": [], "usage": {"a": 1}},
    "error a text": {"error": "upstream fell over"},
    "error empty": {"error": {}, "choices": []},
}


async def clock() -> str:
    """Tell the time."""
    return "noon"


@pytest.fixture(scope="module")
def model_server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture(params=["lean", "stock"])
async def models(request: pytest.FixtureRequest, model_server: ModelServer) -> AsyncIterator[ModelRegistry]:
    model_server.reset()
    registry = server_models(model_server, request.param, first_event_timeout_s=2, idle_timeout_s=0.2)
    yield registry
    await registry.close()


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("name", SHAPES)
async def test_a_strange_chunk(
    models: ModelRegistry, model_server: ModelServer, name: str, ends: bool
) -> None:
    """It is passed over, or the answer is malformed; either way the connection is let go at once."""
    hi, stop = choice({"content": "hi"}), choice({}, "stop")
    data = "".join(f"data: {json.dumps(each)}\n\n" for each in (hi, SHAPES[name], stop))
    done = "data: [DONE]\n\n" if ends else ""
    model_server.script({"mode": "raw", "data": data + done, "hold": not ends})
    with contextlib.suppress(ModelError):
        answer, _ = await run(make_agent(models, clock), "hello")
        assert text_of(answer.messages).startswith("hi")
    await until(lambda: model_server.stats()["streaming"] == 0, 1)
