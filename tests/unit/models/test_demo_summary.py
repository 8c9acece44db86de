"""What the demo model sums up, and that it goes on from its own summary."""

import json
from typing import Any

import pytest
from autogen_core.models import AssistantMessage, LLMMessage, SystemMessage, UserMessage

from app.domain.compaction import SUMMARY_PROMPT, SUMMARY_QUESTION
from app.models.demo import DemoClient
from app.models.demo_summary import Earlier, read_summary, summarise


def transcript(*lines: dict[str, Any]) -> str:
    return "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\nSummarise."


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "text": text}


SAID = {"role": "assistant", "text": "OK"}


@pytest.mark.parametrize(
    ("lines", "known"),
    [
        ([user("My name is Alice"), SAID], Earlier("Alice", 2, "My name is Alice")),
        ([user("我叫张三"), SAID, user("你好"), SAID], Earlier("张三", 4, "你好")),
        ([user("I am Ann"), SAID, user("Call me Bob"), SAID], Earlier("Bob", 4, "Call me Bob")),
        ([user("我叫 Alice Smith"), SAID, user("thanks")], Earlier("Alice Smith", 3, "thanks")),
        ([user("x\n\n- Name: Eve\n”"), SAID], Earlier(None, 2, "x - Name: Eve ”")),
        ([user("a" * 50)], Earlier(None, 1, "a" * 40 + "…")),
        ([{"role": "tool", "name": "add", "text": "My name is Tool"}], Earlier()),
        ([{"role": "assistant", "calls": []}, user("")], Earlier(None, 2, None)),
        ([], Earlier()),
    ],
)
def test_a_summary_says_what_was_told(lines: list[dict[str, Any]], known: Earlier) -> None:
    """The name that was told last, how many messages there were and the last thing said."""
    assert read_summary(summarise(transcript(*lines))) == known


def test_a_summary_takes_in_the_one_before() -> None:
    """What is told anew counts, what is not stays, and the messages add up."""
    first = summarise(transcript(user("我叫张三"), SAID))
    second = summarise(transcript({"role": "summary", "text": first}, user("好"), SAID))
    assert read_summary(second) == Earlier("张三", 4, "好")
    renamed = summarise(transcript({"role": "summary", "text": first}, user("我叫李四"), SAID))
    assert read_summary(renamed) == Earlier("李四", 4, "我叫李四")
    assert read_summary(summarise(transcript({"role": "summary", "text": second}))) == Earlier(
        "张三", 4, "好"
    )


def test_a_summary_is_in_the_language_of_the_last_message() -> None:
    """Chinese or English, in a form that people can read."""
    assert summarise(transcript(user("My name is Ann"), SAID)) == (
        "A summary by the demo model:\n- Name: Ann\n- Messages: 2\n- Last said: “My name is Ann”"
    )
    assert summarise(transcript(user("我叫张三"), SAID)) == (
        "演示模型的摘要：\n- 名字：张三\n- 消息数：2\n- 最后说的是：“我叫张三”"
    )


@pytest.mark.parametrize("text", ["", "{", "[]\n1\n{}", "My name is Alice", '{"role": 1, "text": null}'])
def test_what_is_no_transcript_has_nothing_to_say(text: str) -> None:
    """It is answered all the same."""
    assert read_summary(summarise(text)) == Earlier()


def test_other_summaries_are_not_understood() -> None:
    """One by another model, or an answer to somebody who asked for one."""
    assert read_summary("The user is called Alice.") is None


def context(summary: str, *texts: str) -> list[LLMMessage]:
    spoken: list[LLMMessage] = [SystemMessage(content="You are a helpful assistant.")]
    for text, reply in ((SUMMARY_QUESTION, summary), *((text, "OK") for text in texts[:-1])):
        spoken += [UserMessage(content=text, source="user"), AssistantMessage(content=reply, source="a")]
    return [*spoken, UserMessage(content=texts[-1], source="user")]


async def ask(messages: list[LLMMessage]) -> str:
    result = await DemoClient().create(messages)
    streamed = [piece async for piece in DemoClient().create_stream(messages)]
    assert result == streamed[-1]
    return str(result.content)


async def test_the_model_makes_a_summary_when_it_is_asked_for_one() -> None:
    """The system prompt is how it knows."""
    request: list[LLMMessage] = [
        SystemMessage(content=SUMMARY_PROMPT),
        UserMessage(content=transcript(user("My name is Alice"), SAID), source="user"),
    ]
    assert read_summary(await ask(request)) == Earlier("Alice", 2, "My name is Alice")
    assert read_summary(await ask([SystemMessage(content="Be kind."), request[1]])) is None


async def test_the_model_goes_on_from_its_summary() -> None:
    """It answers as if it still had what the summary stands for: name, count and the message before."""
    summary = summarise(transcript(user("My name is Alice"), SAID, user("I like tea"), SAID))
    assert await ask(context(summary, "What is my name?")) == "Your name is Alice."
    shown = await ask(context(summary, "Go on"))
    assert "has 5 messages" in shown
    assert "Before that you said “I like tea”." in shown
    assert "has 7 messages" in (later := await ask(context(summary, "Well", "Go on")))
    assert "Before that you said “Well”." in later


async def test_a_name_told_after_the_summary_counts() -> None:
    """The latest name wins."""
    summary = summarise(transcript(user("我叫张三"), SAID))
    assert await ask(context(summary, "我叫李四", "我叫什么？")) == "你叫李四。"


async def test_somebody_elses_summary_is_a_conversation_like_any_other() -> None:
    """Its question and answer are two messages."""
    assert "has 3 messages" in await ask(context("They talked.", "Go on"))
