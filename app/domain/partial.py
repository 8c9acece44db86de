"""What is kept of a turn that was cut off: built from its events, never from the agent.

The agent's own context may hold a tool call without its result, which the
model's provider would refuse on every later turn; the events tell exactly
what was completed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from app.domain.arguments import write_arguments
from app.domain.events import ReasoningDelta, TextDelta, ToolCalled, ToolReturned, TurnEvent
from app.domain.turn import (
    AssistantText,
    ContextMessage,
    ToolCall,
    ToolCalls,
    ToolResult,
    ToolResults,
    UserText,
)


@dataclass(slots=True)
class _Step:
    """One model call: what it said, the tools it asked for, and what they returned."""

    text: list[str] = field(default_factory=list)
    calls: dict[str, ToolCall] = field(default_factory=dict)
    results: dict[str, ToolResult] = field(default_factory=dict)

    def messages(self) -> list[ContextMessage]:
        text = "".join(self.text)
        done = [call_id for call_id in self.calls if call_id in self.results]
        if not done:
            return [AssistantText(text, interrupted=True)] if text else []
        calls = ToolCalls(tuple(self.calls[call_id] for call_id in done), text)
        return [calls, ToolResults(tuple(self.results[call_id] for call_id in done))]


def keep_partial(message: str, events: Iterable[TurnEvent]) -> tuple[ContextMessage, ...]:
    """Return the context messages of a turn that was cut off after ``events``.

    The input, completed pairs of tool calls and results, and the text so far, marked
    ``interrupted``. Empty when nothing had been produced.
    """
    steps = [_Step()]
    for event in events:
        step = steps[-1]
        if isinstance(event, TextDelta | ReasoningDelta | ToolCalled) and step.results:
            step = _Step()
            steps.append(step)
        match event:
            case TextDelta(text):
                step.text.append(text)
            case ToolCalled(call_id, name, arguments):
                step.calls[call_id] = ToolCall(call_id, name, write_arguments(arguments))
            case ToolReturned(call_id, name, content, is_error):
                step.results[call_id] = ToolResult(call_id, name, content, is_error)
            case _:
                pass
    produced = [message for step in steps for message in step.messages()]
    return (UserText(message), *produced) if produced else ()
