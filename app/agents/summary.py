"""Having a model sum up a path.

The path is sent as a transcript inside one message, not as messages of their own: providers
refuse calls and results of tools where no tools are declared, and a model that is sent a
conversation goes on with it. Each line is a JSON object, so that nothing somebody said can
pass for a line of its own, or for somebody else's.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any, Final

from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage, SystemMessage, UserMessage

from app.agents.context import estimate_tokens
from app.agents.encoding import Conversation
from app.agents.think import ThinkSplitter
from app.agents.translate import USER_SOURCE, path_to_llm, to_llm
from app.domain.compaction import SUMMARY_PROMPT, summary_messages
from app.domain.errors import ModelError
from app.domain.session import Path
from app.domain.turn import AssistantText, ContextMessage, Summary, ToolCalls, Usage, UserText

_REQUEST: Final = "Summarise the conversation above."
_CUT: Final = ("length", "content_filter", "function_calls")


async def ask_for_summary(client: ChatCompletionClient, path: Path) -> Summary:
    """Have the model behind ``client`` sum up ``path``, its own summary included.

    Costs one call. When cancelled, the connection to the model is closed.

    Raises:
        ModelUnavailable, ModelRateLimited: the model does not answer.
        ModelError: it does not, or with nothing, or was cut off: what came after would be lost.
    """
    transcript = "\n".join(_lines_of(path))
    asked: list[LLMMessage] = [
        SystemMessage(content=SUMMARY_PROMPT),
        UserMessage(content=f"{transcript}\n\n{_REQUEST}", source=USER_SOURCE),
    ]
    text, result = await _listen(client, asked)
    if result.finish_reason in _CUT:
        raise ModelError("The model's summary was cut off.")
    if not text:
        raise ModelError("The model's summary was empty.")
    return Summary(
        text=text,
        tokens_before=_tokens_of(path_to_llm(path)),
        tokens_after=_tokens_of(to_llm(summary_messages(text))),
        usage=Usage(result.usage.prompt_tokens, result.usage.completion_tokens),
    )


async def _listen(client: ChatCompletionClient, asked: Sequence[LLMMessage]) -> tuple[str, CreateResult]:
    """Return what the model says, its reasoning left out, and how the call ended."""
    splitter = ThinkSplitter()
    said: list[str] = []
    result: CreateResult | None = None
    # Closed however this ends: an open stream would keep its connection.
    async with aclosing(client.create_stream(Conversation(asked, ()))) as stream:
        async for piece in stream:
            if isinstance(piece, str):
                said.append(splitter.feed(piece)[0])
            else:
                result = piece
    if result is None:
        raise ModelError
    said.append(splitter.end()[0])
    return "".join(said).strip(), result


def _lines_of(path: Path) -> Iterator[str]:
    if path.summary is not None:
        yield _line(role="summary", text=path.summary)
    for message in path.messages:
        yield from _lines_of_message(message)


def _lines_of_message(message: ContextMessage) -> Iterator[str]:
    if isinstance(message, UserText):
        yield _line(role="user", text=message.text)
    elif isinstance(message, AssistantText):
        if message.text:
            cut_off = {"cut_off": True} if message.interrupted else {}
            yield _line(role="assistant", text=message.text, **cut_off)
    elif isinstance(message, ToolCalls):
        calls = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
        yield _line(role="assistant", **({"text": message.text} if message.text else {}), calls=calls)
    else:
        for result in message.results:
            failed = {"is_error": True} if result.is_error else {}
            yield _line(role="tool", name=result.name, text=result.content, **failed)


def _line(**members: Any) -> str:
    return json.dumps(members, ensure_ascii=False)


def _tokens_of(messages: Sequence[LLMMessage]) -> int:
    return sum(map(estimate_tokens, messages))
