"""The demo model as AutoGen sees it."""

import asyncio

import pytest
from autogen_core import CancellationToken
from autogen_core.models import AssistantMessage, CreateResult, SystemMessage, UserMessage

from app.models.demo import DemoClient

MESSAGES = [
    SystemMessage(content="You are a helpful assistant."),
    UserMessage(content="我叫 Alice", source="user"),
    AssistantMessage(content="你好 Alice！", source="assistant"),
]


def asking(text: str) -> list[SystemMessage | UserMessage | AssistantMessage]:
    return [*MESSAGES, UserMessage(content=text, source="user")]


@pytest.mark.parametrize(
    "question", ["我叫什么？", "What is my name?", "Tell me a joke, please", "随便 say 点什么\n吧"]
)
async def test_the_words_joined_are_the_answer(question: str) -> None:
    """The pieces that stream are the result's text, and there are several."""
    pieces = [piece async for piece in DemoClient().create_stream(asking(question))]
    result = pieces.pop()
    assert isinstance(result, CreateResult)
    assert len(pieces) > 2
    assert "".join(map(str, pieces)) == result.content
    assert result == await DemoClient().create(asking(question))


async def test_chinese_streams_by_one_or_two_characters() -> None:
    """A Chinese answer comes in small pieces; a Latin word in it stays whole."""
    pieces = [p async for p in DemoClient().create_stream(asking("我叫什么？")) if isinstance(p, str)]
    assert pieces == ["你叫", " Alice", "。"]


async def test_usage_is_counted_as_documented() -> None:
    """One token for each Chinese character and each run of others."""
    result = await DemoClient().create([UserMessage(content="我叫 Alice Smith", source="user")])
    assert result.usage.prompt_tokens == 4
    assert result.usage.completion_tokens > 0


async def test_a_cancelled_token_ends_the_stream() -> None:
    """No word follows the cancellation."""
    token = CancellationToken()
    stream = DemoClient().create_stream(asking("Hello"), cancellation_token=token)
    await anext(stream)
    token.cancel()
    with pytest.raises(asyncio.CancelledError):
        await anext(stream)
