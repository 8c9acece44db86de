"""What was measured on AutoGen and decides how it is used, where no other test shows it."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version

import pytest

from app.agents.autogen import MAX_TOOL_ITERATIONS
from app.agents.translate import AGENT_NAME, USER_SOURCE
from app.domain.turn import AssistantText, UserText, text_of
from app.models.registry import ModelRegistry
from tests.modelserver import ModelServer
from tests.unit.agents.making import make_agent, run, server_models, until


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
    registry = server_models(model_server, request.param)
    yield registry
    await registry.close()


@pytest.mark.parametrize("package", ["autogen-agentchat", "autogen-core", "autogen-ext"])
def test_the_version_that_all_this_holds_for(package: str) -> None:
    """One version is installed: the seams that are used are not promised by any other."""
    assert version(package) == "0.7.5"


def test_names_are_constants() -> None:
    """The agent's name is an identifier and the user's plain ASCII: AutoGen fails late on others."""
    assert AGENT_NAME.isidentifier()
    assert USER_SOURCE.isascii()
    assert USER_SOURCE.isidentifier()


async def test_text_of_any_kind_is_no_name(models: ModelRegistry, model_server: ModelServer) -> None:
    """What people write goes into the content, and nowhere else."""
    message = "张三 \N{PILE OF POO} <think> {key} \u2028 ]]>"
    answer, _ = await run(make_agent(models), message)
    assert json.loads(text_of(answer.messages))["texts"][-1] == message
    (body,) = model_server.requests()
    assert body["messages"][-1] == {"role": "user", "content": message}


async def test_a_model_that_likes_tools_is_asked_for_words(
    models: ModelRegistry, model_server: ModelServer
) -> None:
    """After eight rounds of tools it is asked once more, without any, and that is the answer."""
    model_server.script({"mode": "tools", "rounds": 99, "repeat": 99})
    answer, _ = await run(make_agent(models, clock), "What time is it?")
    requests = model_server.requests()
    assert len(requests) == MAX_TOOL_ITERATIONS + 1 == 9
    assert [bool(body.get("tools")) for body in requests] == [True] * 8 + [False]
    assert json.loads(text_of(answer.messages))["n"] == 2 + 2 * 8


async def test_every_call_streams_with_usage(models: ModelRegistry, model_server: ModelServer) -> None:
    """Without that there would be no usage; also where tools are used, and where nobody watches."""
    model_server.script({"mode": "tools", "repeat": 2})
    await run(make_agent(models, clock), "What time is it?")
    await models.client_for("scripted", "m", {}).create([])
    for body in model_server.requests():
        assert body["stream"] is True
        assert body["stream_options"] == {"include_usage": True}


async def test_whatever_autogen_breaks_on_closes_the_connection(
    model_server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even while somebody keeps the exception, and with it every frame that it came through."""

    def fail(**_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("autogen_ext.models.openai._openai_client.LLMStreamStartEvent", fail)
    model_server.reset()
    model_server.script({"mode": "stall_mid"})
    registry = server_models(model_server, "stock")
    with pytest.raises(RuntimeError, match="boom") as caught:
        await run(make_agent(registry), "hello")
    await until(lambda: model_server.stats()["streaming"] == 0, 1)
    assert caught.tb is not None
    await registry.close()


async def test_a_long_history_costs_the_lean_client_a_fraction(model_server: ModelServer) -> None:
    """With 400 messages a turn takes less than a fifth of the stock client's processor time."""
    history = tuple(m for i in range(200) for m in (UserText(f"q{i}"), AssistantText(f"a{i}")))
    spent = {}
    for kind in ("lean", "stock"):
        registry = server_models(model_server, kind)
        taken = []
        for _ in range(4):
            agent = make_agent(registry, messages=history)
            begun = time.thread_time()
            await run(agent, "hello")
            taken.append(time.thread_time() - begun)
        spent[kind] = min(taken)
        await registry.close()
    assert spent["lean"] * 5 < spent["stock"]
