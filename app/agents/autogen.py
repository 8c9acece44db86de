"""One session's live agent: AutoGen's ``AssistantAgent`` around a context of ours.

The shell (prompt, model, tools) costs some 20 µs and holds nothing; the context is what
lives. After a failed or cancelled turn the context is in an unknown state: AutoGen
never cleans up. The pool drops such an agent.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_core import CancellationToken, trace_invoke_agent_span
from autogen_core.models import (
    ChatCompletionClient,
    CreateResult,
    LLMMessage,
    ModelInfo,
    RequestUsage,
    UserMessage,
)
from autogen_core.tools import Tool, ToolSchema
from opentelemetry import trace
from pydantic import BaseModel

from app.agents.context import SessionContext
from app.agents.source import Teller
from app.agents.token import PruningToken
from app.agents.tools import CachedWorkbench
from app.agents.translate import AGENT_NAME, USER_SOURCE, TurnReader, path_to_llm, size_of, to_llm
from app.domain.catalog import ContextPolicy
from app.domain.errors import ModelError
from app.domain.session import Path, Stamp
from app.domain.turn import Answer
from app.ports import Emit

MAX_TOOL_ITERATIONS: Final = 8

_SHELL_BYTES: Final = 8 * 1024
# Of the stored bytes. Messages stay encoded: measured are 120 to 140, Python's own objects included.
_LIVE_PERCENT: Final = 150
# Asked for once: whoever sets a provider later is found all the same, and AutoGen's own way
# looks into the environment each turn.
_TRACER: Final = trace.get_tracer("autogen-core")


@dataclass(frozen=True, slots=True)
class Shell:
    """What an agent is built around its context with: everything but the conversation."""

    client: ChatCompletionClient
    workbench: CachedWorkbench
    system_prompt: str
    policy: ContextPolicy
    max_tool_iterations: int = MAX_TOOL_ITERATIONS


class AutogenAgent:
    """Implements ``app.ports.LiveAgent``."""

    __slots__ = ("_client", "_context", "_shell", "_stored_bytes", "_token", "stamp")

    def __init__(self, stamp: Stamp, path: Path, shell: Shell) -> None:
        self._context = SessionContext(path_to_llm(path))
        self._stored_bytes = path.stored_bytes
        self._token: PruningToken | None = None
        self.refit(stamp, shell)

    def refit(self, stamp: Stamp, shell: Shell) -> None:
        """Keep the context and build a new shell around it."""
        self.stamp = stamp
        self._client = _Listening(shell.client, self._context)
        self._context.policy = shell.policy
        self._shell = AssistantAgent(
            AGENT_NAME,
            self._client,
            workbench=shell.workbench,
            model_context=self._context,
            system_message=shell.system_prompt or None,
            model_client_stream=True,
            # A model that never stops asking for tools is asked for words in the end.
            reflect_on_tool_use=True,
            max_tool_iterations=shell.max_tool_iterations,
        )

    @property
    def estimated_bytes(self) -> int:
        return _SHELL_BYTES + self._stored_bytes * _LIVE_PERCENT // 100

    @property
    def estimated_tokens(self) -> int:
        return self._context.tokens

    async def run(self, message: str, emit: Emit) -> Answer:
        """Carry out one turn; see ``LiveAgent.run``.

        Cancelling the task, or the token through ``cancel()``, raises ``CancelledError``, once
        every thread that a tool runs in has ended.
        """
        assert self._token is None, "one turn at a time"
        token = self._token = PruningToken()
        mark = self._context.mark()
        reader = TurnReader(message, emit)
        self._client.reader = reader
        try:
            await self._converse(message, reader, token)
            answer = reader.answer()
        except asyncio.CancelledError:
            token.cancel()
            # No thread can be stopped, and while one works for this turn it has not ended.
            await token.wait_threads()
            raise
        except BaseException as error:
            # AutoGen's tool tasks outlive an exception, and a cancellation too.
            token.cancel()
            if isinstance(error, RuntimeError) and "Reflect on tool use" in str(error):
                raise ModelError("The model went on asking for tools instead of answering.") from error
            raise
        finally:
            self._token = None
            self._client.reader = None
        self._context.replace_from(mark, to_llm(answer.messages))
        self._stored_bytes += size_of(answer.messages)
        return answer

    async def _converse(self, message: str, reader: TurnReader, token: CancellationToken) -> None:
        """Do what ``run_stream`` does, without the messages that it makes for its own result."""
        await self._context.add_message(UserMessage(content=message, source=USER_SOURCE))
        stream = self._shell.on_messages_stream((), token)
        with trace_invoke_agent_span(AGENT_NAME, tracer=_TRACER, agent_description=self._shell.description):
            async with aclosing(stream):
                async for event in stream:
                    reader.take(event)

    def cancel(self) -> None:
        """Ask the running turn to stop; harmless without one."""
        if self._token is not None:
            self._token.cancel()


class _Listening(ChatCompletionClient):
    """Gives the model the context and its words to the running turn's reader; AutoGen gets the result.

    ``AssistantAgent`` drops the finish reason, and wraps every piece of text in an event
    with a UUID and a time of its own, which costs a quarter of all that a token costs.
    """

    def __init__(self, client: ChatCompletionClient, context: SessionContext) -> None:
        self._client = client
        self._teller = client if isinstance(client, Teller) else None  # asking costs as much as a token
        self._context = context
        self.reader: TurnReader | None = None

    async def create_stream(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = (),
        tool_choice: Tool | Literal["auto", "required", "none"] = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
    ) -> AsyncGenerator[str | CreateResult, None]:
        asked: dict[str, Any] = {
            "tools": tools,
            "tool_choice": tool_choice,
            "json_output": json_output,
            "extra_create_args": extra_create_args or {},
            "cancellation_token": cancellation_token,
        }
        reader = self.reader
        assert reader is not None, "a model is only asked in a turn"
        conversation = self._context.shown(messages)
        if self._teller is not None:
            result = await self._teller.tell(reader.hear, conversation, **asked)
            reader.note(result)
            yield result
            return
        # Whatever breaks this loop: an open stream would live as long as the exception does.
        async with aclosing(self._client.create_stream(conversation, **asked)) as stream:
            async for piece in stream:
                if isinstance(piece, str):
                    reader.hear(piece)
                else:
                    reader.note(piece)
                    yield piece

    async def create(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = (),
        tool_choice: Tool | Literal["auto", "required", "none"] = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
    ) -> CreateResult:
        return await self._client.create(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            json_output=json_output,
            extra_create_args=extra_create_args or {},
            cancellation_token=cancellation_token,
        )

    async def close(self) -> None:
        """Do nothing: the client is shared, and its source closes it."""

    def actual_usage(self) -> RequestUsage:
        return self._client.actual_usage()

    def total_usage(self) -> RequestUsage:
        return self._client.total_usage()

    def count_tokens(self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = ()) -> int:
        return self._client.count_tokens(messages, tools=tools)

    def remaining_tokens(
        self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = ()
    ) -> int:
        return self._client.remaining_tokens(messages, tools=tools)

    @property
    def capabilities(self) -> ModelInfo:
        return self._client.model_info

    @property
    def model_info(self) -> ModelInfo:
        return self._client.model_info
