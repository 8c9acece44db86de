"""Between AutoGen's messages and events and ours: the only place that knows both."""

from collections.abc import Iterable
from typing import Final

from autogen_agentchat.base import Response
from autogen_agentchat.messages import (
    TextMessage,
    ToolCallExecutionEvent,
    ToolCallRequestEvent,
    ToolCallSummaryMessage,
)
from autogen_core import FunctionCall
from autogen_core.models import (
    AssistantMessage,
    CreateResult,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    LLMMessage,
    UserMessage,
)

from app.agents.think import ThinkSplitter
from app.domain.arguments import parse_arguments
from app.domain.compaction import summary_messages
from app.domain.errors import ModelError
from app.domain.events import ReasoningDelta, TextDelta, ToolCalled, ToolReturned
from app.domain.session import Path
from app.domain.turn import (
    Answer,
    AssistantText,
    ContextMessage,
    ToolCall,
    ToolCalls,
    ToolResult,
    ToolResults,
    Usage,
    UserText,
)
from app.ports import Emit

# Names that AutoGen wants and providers see. Constants: a source that is not plain ASCII
# makes the library fail after it has put the message into the context.
USER_SOURCE: Final = "user"
AGENT_NAME: Final = "assistant"


def to_llm(messages: Iterable[ContextMessage]) -> list[LLMMessage]:
    """Return ``messages`` as the model is sent them.

    Reasoning is not sent back. An answer that was cut off is an answer like any other;
    one without text is left out, since providers refuse it.
    """
    return [_to_llm(m) for m in messages if not (isinstance(m, AssistantText) and not m.text)]


def path_to_llm(path: Path) -> list[LLMMessage]:
    """Return what the model is sent for ``path``: what stands for its summary first, if it has one."""
    summary = () if path.summary is None else summary_messages(path.summary)
    return to_llm((*summary, *path.messages))


def _to_llm(message: ContextMessage) -> LLMMessage:
    if isinstance(message, UserText):
        return UserMessage(content=message.text, source=USER_SOURCE)
    if isinstance(message, AssistantText):
        return AssistantMessage(content=message.text, source=AGENT_NAME)
    if isinstance(message, ToolCalls):
        calls = [FunctionCall(id=c.call_id, arguments=c.arguments, name=c.name) for c in message.calls]
        return AssistantMessage(content=calls, thought=message.text or None, source=AGENT_NAME)
    return FunctionExecutionResultMessage(
        content=[
            FunctionExecutionResult(content=r.content, name=r.name, call_id=r.call_id, is_error=r.is_error)
            for r in message.results
        ]
    )


class TurnReader:
    """Reads one turn: emits our events, and collects the messages that it consists of.

    It hears the model's words as they stream, and takes AutoGen's events in between. The
    messages are made of what was streamed, so the texts of all of them joined are the
    text deltas joined.
    """

    def __init__(self, message: str, emit: Emit) -> None:
        self._emit = emit
        self._messages: list[ContextMessage] = [UserText(message)]
        self._answered = False
        self._usage = Usage()
        self._finish_reason = "stop"
        self._begin_call()

    def hear(self, piece: str) -> None:
        """Hear the next piece of the running model call."""
        self._say(*self._splitter.feed(piece))

    def note(self, result: CreateResult) -> None:
        """Note how a model call ended and what it cost."""
        used = result.usage
        self._usage = Usage(
            self._usage.prompt_tokens + used.prompt_tokens,
            self._usage.completion_tokens + used.completion_tokens,
        )
        self._finish_reason = result.finish_reason

    def take(self, event: object) -> None:
        """Take the next item of ``on_messages_stream``; thoughts, which have been heard, are passed over.

        Raises:
            ModelError: the model's answer does not fit together.
        """
        if isinstance(event, Response):
            event = event.chat_message
        if isinstance(event, ToolCallRequestEvent):
            self._called(event.content)
        elif isinstance(event, ToolCallExecutionEvent):
            self._returned(event.content)
        elif isinstance(event, TextMessage):
            self._answered_with(event.content)
        elif isinstance(event, ToolCallSummaryMessage):
            raise ModelError("The model went on asking for tools instead of answering.")

    def answer(self) -> Answer:
        """Return everything that the turn added to the context, what it cost and why it ended.

        Raises:
            ModelError: there is no answer, or it has no text.
        """
        last = self._messages[-1]
        if not self._answered or not isinstance(last, AssistantText) or not last.text.strip():
            raise ModelError("The model's answer was empty.")
        return Answer(tuple(self._messages), self._usage, self._finish_reason)

    def _begin_call(self) -> None:
        self._splitter = ThinkSplitter()
        self._text: list[str] = []
        self._reasoning: list[str] = []

    def _say(self, text: str, reasoning: str) -> None:
        # A piece that ends the reasoning has both: what was thought came first.
        if reasoning:
            self._reasoning.append(reasoning)
            self._emit(ReasoningDelta(reasoning))
        if text:
            self._text.append(text)
            self._emit(TextDelta(text))

    def _end_call(self) -> tuple[str, str]:
        self._say(*self._splitter.end())
        said = "".join(self._text), "".join(self._reasoning)
        self._begin_call()
        return said

    def _called(self, calls: list[FunctionCall]) -> None:
        text, reasoning = self._end_call()
        ours = tuple(ToolCall(call_id=c.id, name=c.name, arguments=c.arguments) for c in calls)
        self._messages.append(ToolCalls(calls=ours, text=text, reasoning=reasoning))
        for call in ours:
            self._emit(ToolCalled(call.call_id, call.name, parse_arguments(call.arguments)))

    def _returned(self, results: list[FunctionExecutionResult]) -> None:
        ours = tuple(ToolResult(r.call_id, r.name, r.content, bool(r.is_error)) for r in results)
        self._messages.append(ToolResults(ours))
        for result in ours:
            self._emit(ToolReturned(result.call_id, result.name, result.content, result.is_error))

    def _answered_with(self, content: str) -> None:
        text, reasoning = self._end_call()
        # What AutoGen says the answer is must be what people saw. With tags in it the
        # two differ by the reasoning, and there is nothing simple to compare.
        if "<think>" not in content and content.lstrip() != text.lstrip():
            raise ModelError("The model's answer differs from what was streamed.")
        self._messages.append(AssistantText(text=text, reasoning=reasoning))
        self._answered = True


def size_of(messages: Iterable[ContextMessage]) -> int:
    """Return about how many bytes ``messages`` take when they are stored."""
    return sum(_PER_MESSAGE + len(text.encode("utf-8", "replace")) for m in messages for text in _texts(m))


_PER_MESSAGE: Final = 16


def _texts(message: ContextMessage) -> list[str]:
    if isinstance(message, UserText):
        return [message.text]
    if isinstance(message, AssistantText):
        return [message.text, message.reasoning]
    if isinstance(message, ToolCalls):
        return [message.text, message.reasoning, *(c.name + c.arguments for c in message.calls)]
    return [r.name + r.content for r in message.results]
