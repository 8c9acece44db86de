"""The built-in model: no network, no key, the same answer to the same conversation.

It says that it is a demo, and it uses what the conversation told it (a name, the
message before, how many there are), so that keeping sessions apart and restoring them
can be seen. It answers in the language of the last message: Chinese when that has a
Chinese character in it, else English. What it understands is in ``demo_talk``. Asked for
a summary it makes one of the same things, and goes on from such a one: ``demo_summary``.

Usage is counted simply: one token for each Chinese character and for each run of
other characters without a space in it.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

from autogen_core import CancellationToken
from autogen_core.models import (
    AssistantMessage,
    ChatCompletionClient,
    CreateResult,
    LLMMessage,
    ModelInfo,
    RequestUsage,
    SystemMessage,
    UserMessage,
)
from autogen_core.tools import Tool, ToolSchema
from pydantic import BaseModel

from app.domain.compaction import SUMMARY_PROMPT, SUMMARY_QUESTION
from app.models.demo_summary import read_summary, summarise
from app.models.demo_talk import Said, answer

_CJK = r"\u3400-\u9fff\uf900-\ufaff\u3000-\u303f\uff00-\uffef"
_PIECE = re.compile(rf"[{_CJK}]{{1,2}}|\s*[^\s{_CJK}]+|\s+")
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_INFO: ModelInfo = {
    "vision": False,
    "function_calling": False,
    "json_output": False,
    "structured_output": False,
    "family": "unknown",
    "multiple_system_messages": True,
}


class DemoClient(ChatCompletionClient):
    """Answers from the conversation that it is sent; ``delay_s`` before each word but the first."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self._delay_s = delay_s
        self._used = RequestUsage(prompt_tokens=0, completion_tokens=0)

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
        """Yield the answer word by word (Chinese: one or two characters), then the result."""
        text = _reply(messages)
        for i, piece in enumerate(_PIECE.findall(text)):
            await asyncio.sleep(self._delay_s if i else 0)
            if cancellation_token is not None and cancellation_token.is_cancelled():
                raise asyncio.CancelledError
            yield piece
        yield self._result(messages, text)

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
        """Return the same answer in one piece."""
        return self._result(messages, _reply(messages))

    def _result(self, messages: Sequence[LLMMessage], text: str) -> CreateResult:
        usage = RequestUsage(
            prompt_tokens=self.count_tokens(messages), completion_tokens=len(_TOKEN.findall(text))
        )
        self._used.prompt_tokens += usage.prompt_tokens
        self._used.completion_tokens += usage.completion_tokens
        return CreateResult(finish_reason="stop", content=text, usage=usage, cached=False)

    async def close(self) -> None:
        """Do nothing: there is nothing open."""

    def actual_usage(self) -> RequestUsage:
        return self._used

    def total_usage(self) -> RequestUsage:
        return self._used

    def count_tokens(self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = ()) -> int:
        return sum(len(_TOKEN.findall(m.content)) for m in messages if isinstance(m.content, str))

    def remaining_tokens(
        self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = ()
    ) -> int:
        return 1_000_000

    @property
    def capabilities(self) -> ModelInfo:
        return _INFO

    @property
    def model_info(self) -> ModelInfo:
        return _INFO


def _reply(messages: Sequence[LLMMessage]) -> str:
    said = _said(messages)
    if any(isinstance(m, SystemMessage) and m.content == SUMMARY_PROMPT for m in messages):
        return summarise(said.texts[-1] if said.texts else "")
    return answer(said)


def _said(messages: Sequence[LLMMessage]) -> Said:
    people = [m for m in messages if isinstance(m, UserMessage | AssistantMessage)]
    earlier = None
    if len(people) > 1 and people[0].content == SUMMARY_QUESTION and isinstance(people[1].content, str):
        earlier = read_summary(people[1].content)
    if earlier is not None:
        del people[:2]
    texts = [m.content for m in people if isinstance(m, UserMessage) and isinstance(m.content, str)]
    if earlier is None:
        return Said(texts, len(people))
    return Said(texts, len(people) + earlier.messages, earlier.name, earlier.last)


class DemoPool:
    """One client for everybody: the demo has no connections and takes no parameters."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self._client = DemoClient(delay_s=delay_s)

    def client(self, model: str, params: Mapping[str, Any]) -> ChatCompletionClient:
        return self._client

    async def close(self) -> None:
        await self._client.close()
