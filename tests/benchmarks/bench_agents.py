"""Between AutoGen and us: hearing tokens, making a path into a context, choosing what is shown."""

import pytest

from app.agents.context import SessionContext
from app.agents.translate import TurnReader, path_to_llm, size_of
from app.domain.catalog import parse_context_policy
from app.domain.events import TurnEvent
from app.domain.session import Path
from app.domain.turn import AssistantText, ContextMessage, UserText

TOKENS = 100
pytestmark = pytest.mark.benchmark(group="agents")


def make_messages(count: int) -> tuple[ContextMessage, ...]:
    pair = UserText("a question 你好"), AssistantText("an answer of some words")
    return pair * (count // 2)


@pytest.mark.parametrize("text", [" token", "字"], ids=["english", "chinese"])
def test_hear_a_hundred_tokens(benchmark, text: str) -> None:
    """A model call's pieces become text deltas."""

    def hear() -> list[TurnEvent]:
        events: list[TurnEvent] = []
        reader = TurnReader("hello", events.append)
        for _ in range(TOKENS):
            reader.hear(text)
        return events

    assert len(benchmark(hear)) == TOKENS


@pytest.mark.parametrize("messages", [20, 1000])
def test_path_to_llm(benchmark, messages: int) -> None:
    """A stored path as the model is sent it, when an agent is built."""
    path = Path("head", None, make_messages(messages), 0)
    assert len(benchmark(path_to_llm, path)) == messages


@pytest.mark.parametrize("policy", ["last:40", "tokens:2000"])
def test_choose_from_a_thousand_messages(benchmark, policy: str) -> None:
    """What a turn shows the model of a long context, encoded as it is."""
    context = SessionContext(path_to_llm(Path("head", None, make_messages(1000), 0)))
    context.policy = parse_context_policy(policy)
    assert 0 < len(benchmark(context.shown, ())) < 1000


def test_size_of_a_turn(benchmark) -> None:
    """What a turn's messages take when they are stored, counted after each."""
    assert benchmark(size_of, make_messages(2)) > 0
