"""Plain functions as tools: in threads that block nobody else and are waited for."""

import asyncio
import threading
from contextvars import ContextVar

import pytest
from autogen_core import CancellationToken

from app.agents.threads import THREADS_PER_TOOL, ThreadTool
from app.agents.token import PruningToken
from app.agents.tools import to_tool

WHO: ContextVar[str] = ContextVar("WHO")


class Blocking:
    """A tool that blocks its thread until the test lets it go."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.tool = ThreadTool(self.block, "Block")

    def block(self) -> str:
        self.begun.release()
        self.gate.wait(60)
        return "late"

    def start(self, token: CancellationToken) -> "asyncio.Task[object]":
        return asyncio.get_running_loop().create_task(self.tool.run_json({}, token))

    async def wait_begun(self, times: int = 1) -> None:
        for _ in range(times):
            assert await asyncio.to_thread(self.begun.acquire, True, 10)


@pytest.fixture
def blocking() -> Blocking:
    made = Blocking()
    yield made
    made.gate.set()


async def call(tool: object, **arguments: object) -> object:
    return await to_tool(tool).run_json(arguments, PruningToken())


async def test_a_plain_function() -> None:
    """Its arguments, its defaults, its result and the caller's context come through; it runs elsewhere."""

    def greet(name: str, times: int = 2) -> str:
        """Greet."""
        assert threading.current_thread() is not threading.main_thread()
        return f"{WHO.get()} greets {name} " * times

    WHO.set("Ann")
    assert await call(greet, name="Bob") == "Ann greets Bob " * 2
    assert to_tool(greet).schema["description"] == "Greet."


async def test_a_function_that_wants_the_token_gets_it() -> None:
    """So that a long one can look whether it should go on."""

    def look(cancellation_token: CancellationToken) -> bool:
        """Look."""
        return isinstance(cancellation_token, PruningToken)

    assert await call(look) is True


@pytest.mark.parametrize("error", [ValueError("no"), StopIteration(), SystemExit(3)])
async def test_what_it_raises(error: BaseException) -> None:
    """It arrives at the caller, whatever it is, and the thread ends without a word."""

    def fail() -> str:
        """Fail."""
        raise error

    with pytest.raises((type(error), RuntimeError)):
        await call(fail)


async def test_threads_that_block_are_nobody_elses(blocking: Blocking) -> None:
    """As many as allowed at once: the loop's own threads and other tools are free; one more waits."""
    token = PruningToken()
    calls = [blocking.start(token) for _ in range(THREADS_PER_TOOL + 1)]
    await blocking.wait_begun(THREADS_PER_TOOL)
    other = Blocking()
    other.gate.set()
    assert await other.start(token) == "late"
    assert not blocking.begun.acquire(blocking=False)
    blocking.gate.set()
    assert await asyncio.gather(*calls) == ["late"] * len(calls)


async def test_the_token_knows_of_a_thread_until_it_ends(blocking: Blocking) -> None:
    """A cancelled call returns at once, its thread does not; asking again does not end the wait."""
    token = PruningToken()
    called = blocking.start(token)
    await blocking.wait_begun()
    called.cancel()
    with pytest.raises(asyncio.CancelledError):
        await called
    waiting = asyncio.get_running_loop().create_task(token.wait_threads())
    await asyncio.sleep(0)
    token.cancel()
    waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    blocking.gate.set()
    async with asyncio.timeout(5):
        await waiting


async def test_the_end_of_the_process_ends_the_wait(blocking: Blocking) -> None:
    """A cancellation that is not the turn's own is obeyed."""
    token = PruningToken()
    called = blocking.start(token)
    await blocking.wait_begun()
    waiting = asyncio.get_running_loop().create_task(token.wait_threads())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    blocking.gate.set()
    await called
