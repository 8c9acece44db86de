"""Ours to AutoGen's messages, and AutoGen's events to ours."""

import pytest
from autogen_agentchat.messages import (
    TextMessage,
    ThoughtEvent,
    ToolCallExecutionEvent,
    ToolCallRequestEvent,
)
from autogen_core import FunctionCall
from autogen_core.models import (
    AssistantMessage,
    CreateResult,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    RequestUsage,
    UserMessage,
)

from app.agents.translate import TurnReader, size_of, to_llm
from app.domain.arguments import parse_arguments, write_arguments
from app.domain.errors import ModelError
from app.domain.events import ReasoningDelta, TextDelta, ToolCalled, ToolReturned, TurnEvent
from app.domain.turn import (
    AssistantText,
    ToolCall,
    ToolCalls,
    ToolResult,
    ToolResults,
    Usage,
    UserText,
    text_of,
)

CALLS = ToolCalls(
    (ToolCall("c1", "add", '{"a": 1}'), ToolCall("c2", "clock", "")), text="Let me see.", reasoning="hm"
)
RESULTS = ToolResults((ToolResult("c1", "add", "3"), ToolResult("c2", "clock", "broken", is_error=True)))


def final(text: str) -> TextMessage:
    return TextMessage(content=text, source="assistant")


REQUEST = ToolCallRequestEvent(
    content=[
        FunctionCall(id="c1", name="add", arguments='{"a": 1}'),
        FunctionCall(id="c2", name="clock", arguments=""),
    ],
    source="assistant",
)
EXECUTION = ToolCallExecutionEvent(
    content=[
        FunctionExecutionResult(content="3", name="add", call_id="c1", is_error=False),
        FunctionExecutionResult(content="broken", name="clock", call_id="c2", is_error=True),
    ],
    source="assistant",
)


def read(*items: object) -> tuple[TurnReader, list[TurnEvent]]:
    events: list[TurnEvent] = []
    reader = TurnReader("question", events.append)
    for item in items:
        if isinstance(item, str):
            reader.hear(item)
        else:
            reader.take(item)
    return reader, events


def test_messages_become_what_the_model_is_sent() -> None:
    """Every kind of message has one form; reasoning is not sent, an interrupted answer is an answer."""
    sent = to_llm([UserText("q"), CALLS, RESULTS, AssistantText("half", "thought", interrupted=True)])
    assert sent == [
        UserMessage(content="q", source="user"),
        AssistantMessage(
            content=[
                FunctionCall(id="c1", arguments='{"a": 1}', name="add"),
                FunctionCall(id="c2", arguments="", name="clock"),
            ],
            thought="Let me see.",
            source="assistant",
        ),
        FunctionExecutionResultMessage(content=EXECUTION.content),
        AssistantMessage(content="half", source="assistant"),
    ]


def test_an_answer_without_text_is_not_sent() -> None:
    """Providers refuse an empty assistant message."""
    assert to_llm([UserText("q"), AssistantText("", "only thought", interrupted=True)]) == to_llm(
        [UserText("q")]
    )


def test_a_turn_with_tools_is_read_in_order() -> None:
    """Events come as they happened, the messages say the same, and the texts agree."""
    reader, events = read(
        "<think>h", "m</think>Let me", " see.", REQUEST, EXECUTION,
        ThoughtEvent(content="x", source="assistant"), "It is ", "3.", final("It is 3."),
    )  # fmt: skip
    assert reader.answer().messages == (UserText("question"), CALLS, RESULTS, AssistantText("It is 3."))
    assert events == [
        ReasoningDelta("h"),
        ReasoningDelta("m"),
        TextDelta("Let me"),
        TextDelta(" see."),
        ToolCalled("c1", "add", {"a": 1}),
        ToolCalled("c2", "clock", {"_raw": ""}),
        ToolReturned("c1", "add", "3", False),
        ToolReturned("c2", "clock", "broken", True),
        TextDelta("It is "),
        TextDelta("3."),
    ]
    assert text_of(reader.answer().messages) == "".join(e.text for e in events if isinstance(e, TextDelta))


def test_usage_and_the_last_reason_are_kept() -> None:
    """A turn costs what its calls cost, and ended as its last call did."""
    reader, _ = read("hi", final("hi"))
    for reason in ("function_calls", "length"):
        usage = RequestUsage(prompt_tokens=3, completion_tokens=2)
        reader.note(CreateResult(finish_reason=reason, content="", usage=usage, cached=False))
    assert reader.answer().usage == Usage(6, 4)
    assert reader.answer().finish_reason == "length"


def test_an_answer_that_was_not_streamed_is_refused() -> None:
    """What AutoGen calls the answer must be what people saw."""
    with pytest.raises(ModelError):
        read("one thing", final("another thing"))


@pytest.mark.parametrize("pieces", [[], [" \n"], ["<think>only thought</think>"]])
def test_an_empty_answer_is_refused(pieces: list[str]) -> None:
    """White space and reasoning are no answer."""
    reader, _ = read(*pieces, final("".join(pieces)))
    with pytest.raises(ModelError):
        reader.answer()


def test_a_turn_without_an_answer_is_refused() -> None:
    """Tool results are not the end of a turn."""
    reader, _ = read(REQUEST, EXECUTION)
    with pytest.raises(ModelError):
        reader.answer()


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"a": [1, "x"]}', {"a": [1, "x"]}),
        ("{}", {}),
        ("[1]", {"_raw": "[1]"}),
        ("null", {"_raw": "null"}),
        ('{"a": ', {"_raw": '{"a": '}),
        ("", {"_raw": ""}),
    ],
)
def test_arguments_are_an_object_always(text: str, arguments: dict[str, object]) -> None:
    """What is no JSON object is kept as text under one key."""
    assert parse_arguments(text) == arguments
    assert parse_arguments(write_arguments(arguments)) == arguments


def test_sizes_count_every_text() -> None:
    """A message's size grows with all of its parts, in bytes of UTF-8."""
    assert size_of([UserText("你" * 100)]) - size_of([UserText("")]) == 300
    assert size_of([CALLS]) > size_of([ToolCalls(CALLS.calls)])
    assert size_of([RESULTS]) > len("addclock3broken")
    assert size_of([UserText("\ud800")]) > 0
