"""Tools that always end with a result, and the token that ends them."""

import asyncio
import logging
import sys
import threading

import pytest
from autogen_core import CancellationToken
from autogen_core.tools import FunctionTool, ToolResult

from app.agents.token import PruningToken
from app.agents.tools import CachedWorkbench


async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def shout(text: str) -> str:
    """Say it louder."""
    return text.upper()


async def fail(text: str) -> str:
    """Fail."""
    raise RuntimeError(f"/secret/path {text}")


async def leave() -> str:
    """Try to end the server."""
    sys.exit(3)


async def give_up() -> str:
    """Raise a cancellation that nobody asked for."""
    raise asyncio.CancelledError


async def hang() -> str:
    """Never return."""
    await asyncio.Event().wait()
    return "never"


async def babble(n: int) -> str:
    """Say a lot."""
    return "x" * n


BENCH = CachedWorkbench([add, FunctionTool(shout, "Louder"), fail, leave, give_up, babble])


async def call(name: str, arguments: dict[str, object] | None = None) -> ToolResult:
    return await BENCH.call_tool(name, arguments, PruningToken(), "c1")


async def test_functions_of_both_kinds_are_tools() -> None:
    """An async function, and one that runs in a thread, return their values as text."""
    assert (await call("add", {"a": 1, "b": 2})).to_text() == "3"
    assert (await call("shout", {"text": "hi"})).to_text() == "HI"


async def test_schemas_are_built_once() -> None:
    """Asking for the tools gives the same list again, with what the docstrings say."""
    listed = await BENCH.list_tools()
    assert listed is await BENCH.list_tools()
    assert listed[0]["description"] == "Add two numbers."
    assert listed[0]["parameters"]["required"] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("fail", {"text": "boo"}, "RuntimeError"),
        ("leave", {}, "SystemExit"),
        ("give_up", {}, "cancelled"),
        ("nobody", {}, "no tool nobody"),
        ("add", {"a": "many"}, "b: Field required"),
    ],
)
async def test_every_failure_is_a_result(name: str, arguments: dict[str, object], told: str) -> None:
    """Whatever a tool raises, the model gets an error that tells the kind and no secrets."""
    result = await call(name, arguments)
    assert result.is_error
    assert told in result.to_text()
    assert "/secret" not in result.to_text()
    assert "many" not in result.to_text()


async def test_the_log_has_what_the_model_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """A failure is logged with its traceback."""
    with caplog.at_level(logging.WARNING, "app.agents.tools"):
        await call("fail", {"text": "boo"})
    assert "/secret/path" in caplog.text


async def test_a_tool_has_so_much_time() -> None:
    """A tool that hangs is stopped, and the model is told."""
    result = await CachedWorkbench([hang], timeout_s=0.01).call_tool("hang", {}, PruningToken())
    assert result.is_error
    assert "longer than 0.01 s" in result.to_text()


async def test_a_timeout_of_the_tools_own_is_a_failure() -> None:
    """A TimeoutError that the tool raises is not taken for its limit."""

    async def slow() -> str:
        """Time out."""
        raise TimeoutError

    result = await CachedWorkbench([slow]).call_tool("slow", {}, PruningToken())
    assert result.to_text() == "Error: the tool failed (TimeoutError)."


async def test_output_is_cut() -> None:
    """Exactly as much as allowed passes whole; what is over it is counted."""
    bench = CachedWorkbench([babble], max_output_chars=10)
    assert (await bench.call_tool("babble", {"n": 10})).to_text() == "x" * 10
    assert (await bench.call_tool("babble", {"n": 12})).to_text() == "x" * 10 + "… [2 more characters]"


async def test_a_cancelled_token_ends_a_running_tool() -> None:
    """The tool is stopped where it stands and the call returns an error."""
    started, stopped = asyncio.Event(), []

    async def wait() -> str:
        """Wait until stopped."""
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(True)
        return "never"

    token = PruningToken()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(CachedWorkbench([wait]).call_tool("wait", {}, token))
        await started.wait()
        token.cancel()
    assert running.result().is_error
    assert stopped == [True]


async def test_no_tool_begins_after_the_cancellation() -> None:
    """A call with a cancelled token does not run the tool."""
    begun = []

    async def note() -> str:
        """Note that it ran."""
        begun.append(True)
        return "ran"

    token = PruningToken()
    token.cancel()
    assert (await CachedWorkbench([note]).call_tool("note", {}, token)).is_error
    assert begun == []


async def test_cancelling_the_task_passes_through() -> None:
    """A task that is cancelled itself ends, and does not get a result instead."""
    task = asyncio.create_task(CachedWorkbench([hang]).call_tool("hang", {}, PruningToken()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_thread_cannot_hold_a_turn() -> None:
    """A function that blocks its thread loses its result, not the turn."""
    gate = threading.Event()

    def block() -> str:
        """Block."""
        gate.wait(5)
        return "late"

    try:
        result = await CachedWorkbench([block], timeout_s=0.02).call_tool("block", {}, PruningToken())
    finally:
        gate.set()
    assert "longer than" in result.to_text()


def test_two_tools_of_one_name_are_refused() -> None:
    """A model could not tell them apart."""
    with pytest.raises(ValueError, match="same name"):
        CachedWorkbench([add, add])


async def test_the_token_forgets_what_has_ended() -> None:
    """After ten thousand futures only the one that runs is kept, and it is cancelled."""
    token, loop = PruningToken(), asyncio.get_running_loop()
    for _ in range(10_000):
        token.link_future(loop.create_future()).set_result(None)
    await asyncio.sleep(0)
    running = token.link_future(loop.create_future())
    assert token._running == {running}
    token.cancel()
    assert running.cancelled()
    assert token.link_future(loop.create_future()).cancelled()


def test_the_token_calls_back_once() -> None:
    """Callbacks run at the cancellation, or at once when it has happened; they may ask the token."""
    token = PruningToken()
    seen: list[bool] = []
    token.add_callback(lambda: seen.append(token.is_cancelled()))
    assert not token.is_cancelled()
    token.cancel()
    token.cancel()
    token.add_callback(lambda: seen.append(True))
    assert seen == [True, True]
    assert isinstance(token, CancellationToken)
