"""The lean and the stock client give the same, for every answer a model server can give."""

import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from app.domain.errors import AgentPoolError, ModelError, ModelRateLimited, ModelUnavailable
from app.domain.events import ReasoningDelta, ToolCalled, ToolReturned, TurnEvent
from app.domain.turn import Answer, AssistantText, ToolCalls, UserText, text_of
from app.models.registry import ModelRegistry
from tests.modelserver import ModelServer
from tests.unit.agents.making import KEY, make_agent, run, server_models, text_of_events

KINDS = ("lean", "stock")


@pytest.fixture(scope="module")
def model_server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def server(model_server: ModelServer) -> ModelServer:
    model_server.reset()
    return model_server


@pytest.fixture(params=KINDS)
async def models(request: pytest.FixtureRequest, server: ModelServer) -> AsyncIterator[ModelRegistry]:
    registry = server_models(server, request.param, first_event_timeout_s=0.3, idle_timeout_s=0.2)
    yield registry
    await registry.close()


async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def clock() -> str:
    """Tell the time."""
    return "noon"


ADD_AND_CLOCK = [
    {"name": "add", "arguments": '{"a": 1, "b": 2}', "id": "x"},
    {"name": "clock", "arguments": "", "id": "x"},
]
GOOD: dict[str, dict[str, Any]] = {
    "echo": {"mode": "echo"},
    "one chunk": {"mode": "text", "text": "你好！", "chunks": 1},
    "many chunks": {"mode": "text", "text": "word " * 50, "chunks": 250},
    "a burst": {"mode": "text", "text": "word " * 50, "chunks": 250, "burst": True},
    "no usage": {"mode": "text", "usage": False},
    "no DONE": {"mode": "text", "done": False},
    "length": {"mode": "text", "finish": "length"},
    "content_filter": {"mode": "text", "finish": "content_filter"},
    "an unheard-of reason": {"mode": "text", "finish": "eos"},
    "reasoning_content": {"mode": "reasoning", "reasoning": "think about it", "text": "So it is."},
    "think": {"mode": "think", "reasoning": "a < b", "text": "So it is.", "chunks": 20},
    "a tag in the text": {"mode": "text", "text": "R1 writes <think> first.", "chunks": 9},
    "two tools": {"mode": "tools", "calls": ADD_AND_CLOCK, "say": "Let me see. ", "repeat": 2},
    "reasoning and a tool": {"mode": "tools", "reasoning": "I need it", "repeat": 2},
    "three rounds": {"mode": "tools", "rounds": 3, "repeat": 4},
    "wrong arguments": {"mode": "tools", "calls": [{"name": "add", "arguments": '{"a": "x"}'}], "repeat": 2},
    "broken arguments": {"mode": "tools", "calls": [{"name": "add", "arguments": '{"a": '}], "repeat": 2},
    "an unknown tool": {"mode": "tools", "calls": [{"name": "rm", "arguments": "{}"}], "repeat": 2},
}  # fmt: skip


def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
    """Return one event of a stream as text."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], **more}, ensure_ascii=False)}\n\n"


USED = {"prompt_tokens": 3, "completion_tokens": 2}
HI = event({"content": "hi"}) + event({}, "stop")
RAW: dict[str, str] = {
    "usage in the last chunk": event({"content": "hi"}) + event({}, "stop", usage=USED),
    "usage in every chunk": event({"content": "hi"}, usage=USED) + event({}, "stop", usage=USED),
    "cut at every byte": event({"content": "你好"}, "stop"),
    "CR LF, cut at every byte": HI.replace("\n", "\r\n"),
    "reasoning twice": event({"reasoning_content": "a"})
    + event({"content": "one "})
    + event({"reasoning_content": "b"})
    + event({"content": "two"})
    + event({}, "stop"),
}
GOOD |= {
    name: {"mode": "raw", "data": data, "pieces": 999 if "every byte" in name else 1}
    for name, data in RAW.items()
}


async def outcome(
    server: ModelServer, kind: Any, step: dict[str, Any]
) -> tuple[Answer, list[TurnEvent], list[Any]]:
    server.reset()
    server.script(step)
    models = server_models(server, kind)
    try:
        answer, events = await run(make_agent(models, add, clock), "What is it?")
    finally:
        await models.close()
    return answer, events, server.requests()


def joined(events: list[TurnEvent]) -> tuple[str, str, list[TurnEvent]]:
    """Return what ``events`` say, however finely it was cut."""
    reasoning = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
    tools = [e for e in events if isinstance(e, ToolCalled | ToolReturned)]
    return text_of_events(events), reasoning, tools


def without_ids(value: Any) -> Any:
    """Return ``value`` with the ids that we gave away made the same."""
    text = repr(value)
    for made in {part[:29] for part in text.split("'") if part.startswith("call_") and len(part) > 20}:
        text = text.replace(made, "call_made")
    return text


@pytest.mark.parametrize("name", GOOD)
async def test_good_answers_are_the_same(server: ModelServer, name: str) -> None:
    """Same request, same messages, usage, finish reason, reasoning and tool events."""
    lean, lean_events, lean_asked = await outcome(server, "lean", GOOD[name])
    stock, stock_events, stock_asked = await outcome(server, "stock", GOOD[name])
    assert without_ids(lean) == without_ids(stock)
    assert without_ids(joined(lean_events)) == without_ids(joined(stock_events))
    assert without_ids(sorted_members(lean_asked)) == without_ids(sorted_members(stock_asked))
    for answer, events in ((lean, lean_events), (stock, stock_events)):
        assert answer.messages[0] == UserText("What is it?")
        assert text_of(answer.messages) == text_of_events(events) != ""


def sorted_members(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: sorted_members(value[key]) for key in sorted(value)}
    return [sorted_members(v) for v in value] if isinstance(value, list) else value


BAD: dict[str, tuple[dict[str, Any], type[AgentPoolError]]] = {
    "never headers": ({"mode": "never_headers"}, ModelUnavailable),
    "stall first": ({"mode": "stall_first"}, ModelUnavailable),
    "comments for ever": ({"mode": "stall_first", "comments": True}, ModelUnavailable),
    "stall mid": ({"mode": "stall_mid"}, ModelUnavailable),
    "comments in the middle": ({"mode": "stall_mid", "comments": True}, ModelUnavailable),
    "drop": ({"mode": "drop", "repeat": 3}, ModelUnavailable),
    "cut": ({"mode": "cut"}, ModelError),
    "rst": ({"mode": "rst"}, ModelError),
    "fin": ({"mode": "fin"}, ModelError),
    "html": ({"mode": "html"}, ModelError),
    "bad json": ({"mode": "bad_json"}, ModelError),
    "error event": ({"mode": "error_event"}, ModelError),
    "error event first": ({"mode": "error_event", "text": ""}, ModelError),
    "empty choices": ({"mode": "empty_choices"}, ModelError),
    "empty text": ({"mode": "empty_text"}, ModelError),
    "filtered empty": ({"mode": "text", "text": "", "finish": "content_filter"}, ModelError),
    "only reasoning": ({"mode": "reasoning", "text": ""}, ModelError),
    "only think": ({"mode": "think", "text": ""}, ModelError),
    "no reason": ({"mode": "text", "finish": None}, ModelError),
    "400": ({"mode": "status", "status": 400, "code": "context_length_exceeded"}, ModelError),
    "401": ({"mode": "status", "status": 401}, ModelError),
    "404": ({"mode": "status", "status": 404}, ModelError),
    "redirect": ({"mode": "redirect"}, ModelError),
    "429": ({"mode": "status", "status": 429, "retry_after": 3600}, ModelRateLimited),
    "500": ({"mode": "status", "status": 500, "repeat": 3}, ModelUnavailable),
    "tools for ever": ({"mode": "tools", "force": True, "rounds": 99, "repeat": 99}, ModelError),
}


@pytest.mark.parametrize("name", BAD)
async def test_failures_are_the_same(
    server: ModelServer, models: ModelRegistry, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every failure is one domain error, its sentence free of the key, of upstream text and of causes."""
    step, error = BAD[name]
    server.script(step)
    with caplog.at_level(logging.DEBUG, "app"), pytest.raises(error) as caught:
        await run(make_agent(models, clock), "What is it?")
    assert type(caught.value) is error
    told = f"{caught.value} {caught.value!r} {vars(caught.value)} {caught.value.__cause__!r} {caplog.text}"
    assert KEY not in told
    assert "echoed" not in told
    assert "refused; you sent" not in told


async def test_a_client_that_gives_up_retrying_says_when_to_come_back(
    server: ModelServer, models: ModelRegistry
) -> None:
    """The upstream Retry-After is passed on, and a long one is not waited for."""
    server.script({"mode": "status", "status": 429, "retry_after": 3600})
    with pytest.raises(ModelRateLimited) as caught:
        await run(make_agent(models), "hello")
    assert caught.value.retry_after_s == 3600
    assert len(server.requests()) == 1


@pytest.mark.parametrize(
    "step", [{"mode": "status", "status": 503}, {"mode": "drop"}, {"mode": "status", "status": 429}]
)
async def test_passing_failures_are_tried_again(
    server: ModelServer, models: ModelRegistry, step: dict[str, Any]
) -> None:
    """What fails twice before its first token and then works is a good turn."""
    server.script({**step, "repeat": 2})
    answer, _ = await run(make_agent(models), "hello")
    assert json.loads(text_of(answer.messages))["n"] == 2
    assert len(server.requests()) == 3


@pytest.mark.parametrize("mode", ["rst", "fin", "stall_mid", "cut"])
async def test_an_answer_that_has_begun_is_never_asked_for_again(
    server: ModelServer, models: ModelRegistry, mode: str
) -> None:
    """After the first token a failure is final."""
    server.script({"mode": mode})
    with pytest.raises(AgentPoolError):
        await run(make_agent(models), "hello")
    assert len(server.requests()) == 1


async def test_the_key_is_not_carried_anywhere_else(server: ModelServer, models: ModelRegistry) -> None:
    """A redirect is not followed, not even to where it would be answered."""
    server.script({"mode": "redirect", "location": "/v1/chat/completions"})
    with pytest.raises(ModelError):
        await run(make_agent(models), "hello")
    assert len(server.requests()) == 1


async def test_nobody_listens(models: ModelRegistry, server: ModelServer) -> None:
    """A refused connection means that the model is unavailable."""
    dead = ModelServer().start()
    dead.stop()
    registry = server_models(dead, models._kind)
    with pytest.raises(ModelUnavailable):
        await run(make_agent(registry), "hello")
    await registry.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_has_so_many_bytes(server: ModelServer, kind: Any) -> None:
    """An answer without end is cut off, with many events as with one line."""
    models = server_models(server, kind, max_bytes=50_000)
    for step in ({"text": "x" * 90_000, "chunks": 90}, {"text": "x" * 90_000, "chunks": 1}):
        server.script({"mode": "text", **step})
        with pytest.raises(ModelError):
            await run(make_agent(models), "hello")
    await models.close()


async def test_usage_is_counted_over_all_calls_of_a_turn(server: ModelServer, models: ModelRegistry) -> None:
    """A turn with a tool costs what both of its model calls cost, and that is not nothing."""
    server.script({"mode": "tools", "repeat": 2})
    answer, _ = await run(make_agent(models, clock), "What time is it?")
    plain, _ = await run(make_agent(models), "What time is it?")
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens > plain.usage.completion_tokens > 0


async def test_the_model_is_sent_what_the_session_says(server: ModelServer, models: ModelRegistry) -> None:
    """Prompt, history, question, model, parameters and key arrive, and nothing else."""
    client = models.client_for("scripted", "m2", {"temperature": 0.5, "max_tokens": 7, "stop": ["x"]})
    messages = (UserText("first"), AssistantText("one", "thought"))
    agent = make_agent(models, messages=messages)
    await run(agent, "second")
    (body,) = server.requests()
    assert body == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "second"},
        ],
    }
    assert server.headers()[0]["authorization"] == f"Bearer {KEY}"
    await client.create([])
    assert (
        server.requests()[1].items()
        >= {"model": "m2", "temperature": 0.5, "max_tokens": 7, "stop": ["x"]}.items()
    )


async def test_calls_with_one_id_are_told_apart(server: ModelServer, models: ModelRegistry) -> None:
    """Two parallel calls that a model gives the same id get two, and no arguments become an empty object."""
    server.script({"mode": "tools", "calls": ADD_AND_CLOCK, "repeat": 2})
    answer, _ = await run(make_agent(models, add, clock), "hello")
    calls = answer.messages[1]
    assert isinstance(calls, ToolCalls)
    assert len({call.call_id for call in calls.calls}) == 2
    assert calls.calls[1].arguments == "{}"
    results = server.requests()[1]["messages"][-2:]
    assert [r["content"] for r in results] == ["3", "noon"]
    assert [r["tool_call_id"] for r in results] == [call.call_id for call in calls.calls]


async def test_connections_are_used_again(server: ModelServer, models: ModelRegistry) -> None:
    """Turns one after another, for two models and other parameters, share one connection."""
    for model, params in (("m", {}), ("m2", {}), ("m", {"seed": 1}), ("m", {"seed": 2})):
        await models.client_for("scripted", model, params).create([])
    assert server.stats() == {"requests": 4, "open": 1, "streaming": 0, "aborted": 0}


async def test_a_finished_answer_is_good_whatever_breaks_after_it(
    server: ModelServer, models: ModelRegistry
) -> None:
    """Text and reason have come; a connection that then breaks loses only the usage."""
    for broken in ("rst", "fin"):
        server.script({"mode": "raw", "data": HI, "then": broken})
        answer, _ = await run(make_agent(models), "hello")
        assert text_of(answer.messages) == "hi"
