"""Tools that cannot hang a turn.

AutoGen 0.7.5 waits for ever when a tool ends with anything but a result: an exception
from the workbench, a ``CancelledError`` of the tool's own, a token cancelled while it
runs (autogen #7956). So the workbench here always returns one.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Final

from autogen_core import CancellationToken
from autogen_core.tools import (
    BaseTool,
    FunctionTool,
    StaticStreamWorkbench,
    StreamTool,
    TextResultContent,
    ToolResult,
    ToolSchema,
)
from pydantic import ValidationError

from app.agents.threads import ThreadTool

ToolSource = BaseTool[Any, Any] | Callable[..., Any]
"""A tool: one of AutoGen's, or a typed function, async or not, whose docstring describes it."""

_CANCELLED: Final = "Error: the tool call was cancelled."

_log = logging.getLogger(__name__)


class CachedWorkbench(StaticStreamWorkbench):
    """A set of tools, made once and shared by all agents that have it.

    Every call ends with a result within ``timeout_s`` (a function in a thread runs on)
    and at most ``max_output_chars`` of text. An exception's own text goes to the
    log, never to the model, but for arguments that do not fit: those it can correct.
    """

    def __init__(
        self, tools: Sequence[ToolSource] = (), *, timeout_s: float = 120.0, max_output_chars: int = 65_536
    ) -> None:
        super().__init__([to_tool(tool) for tool in tools])
        self._by_name = {tool.name: tool for tool in self._tools}
        if len(self._by_name) != len(self._tools):
            raise ValueError("two tools have the same name")
        # Building a schema costs 0.2 ms a tool, and AutoGen asks twice a call.
        self._schemas: list[ToolSchema] = [tool.schema for tool in self._tools]
        self._timeout_s = timeout_s
        self._max_output_chars = max_output_chars

    @property
    def has_tools(self) -> bool:
        return bool(self._by_name)

    async def list_tools(self) -> list[ToolSchema]:
        """Return the schemas, the same list every time."""
        return self._schemas

    async def call_tool_stream(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
        call_id: str | None = None,
    ) -> AsyncGenerator[Any | ToolResult, None]:
        """Yield the call's result; what a streaming tool says on its way is not passed on."""
        yield await self.call_tool(name, arguments, cancellation_token, call_id)

    async def call_tool(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
        call_id: str | None = None,
    ) -> ToolResult:
        """Call a tool and return its result; a failure is a result with ``is_error``.

        Does not begin when the token is cancelled; ends when it becomes so. Raises
        ``CancelledError`` only when the calling task itself is cancelled.
        """
        token = cancellation_token or CancellationToken()
        tool = self._by_name.get(name)
        if tool is None:
            return _result(name, f"Error: there is no tool {name}.", is_error=True)
        if token.is_cancelled():
            return _result(name, _CANCELLED, is_error=True)
        try:
            output = await self._bounded(tool, arguments or {}, token, call_id)
            return _result(name, self._capped(tool.return_value_as_string(output)))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return _result(name, _CANCELLED, is_error=True)
        except _OutOfTime:
            late = f"Error: the tool took longer than {self._timeout_s:g} s and was stopped."
            return _result(name, late, is_error=True)
        except ValidationError as error:
            return _result(name, self._capped(_misfits(error)), is_error=True)
        except (Exception, SystemExit) as error:  # a tool that calls sys.exit() must not end the server
            _log.warning("tool %s failed", name, exc_info=True)
            return _result(name, f"Error: the tool failed ({type(error).__name__}).", is_error=True)

    async def _bounded(
        self,
        tool: BaseTool[Any, Any],
        arguments: Mapping[str, Any],
        token: CancellationToken,
        call_id: str | None,
    ) -> Any:
        """Run ``tool`` until it ends, its time is up or the token is cancelled; the last two end it."""
        loop = asyncio.get_running_loop()
        over = False
        try:
            async with asyncio.timeout(self._timeout_s) as limit:

                def stop() -> None:
                    # No task of its own to cancel: the limit ends the tool where it stands.
                    if not over and not limit.expired():
                        limit.reschedule(loop.time())

                token.add_callback(stop)
                return await _run(tool, arguments, token, call_id)
        except TimeoutError:
            if not limit.expired():
                raise
            if token.is_cancelled():
                raise asyncio.CancelledError from None
            raise _OutOfTime from None
        finally:
            over = True

    def _capped(self, text: str) -> str:
        surplus = len(text) - self._max_output_chars
        return text if surplus <= 0 else f"{text[: self._max_output_chars]}… [{surplus} more characters]"


class _OutOfTime(Exception):
    """The tool's time is up; a ``TimeoutError`` could be the tool's own."""


def to_tool(source: ToolSource) -> BaseTool[Any, Any]:
    """Return ``source`` as a tool.

    Raises:
        ValueError, TypeError: it is a function whose arguments have no types.
    """
    if isinstance(source, BaseTool):
        return source
    description = (source.__doc__ or "").strip()
    is_async = inspect.iscoroutinefunction(source)
    return FunctionTool(source, description) if is_async else ThreadTool(source, description)


async def _run(
    tool: BaseTool[Any, Any], arguments: Mapping[str, Any], token: CancellationToken, call_id: str | None
) -> Any:
    if not isinstance(tool, StreamTool):
        return await tool.run_json(arguments, token, call_id=call_id)
    said = [piece async for piece in tool.run_json_stream(arguments, token, call_id=call_id)]
    return said[-1] if said else None


def _misfits(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return "Error: " + "; ".join(f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in found)


def _result(name: str, text: str, *, is_error: bool = False) -> ToolResult:
    return ToolResult(name=name, result=[TextResultContent(content=text)], is_error=is_error)
