"""How much of a path the model is sent, and that nothing else changes by it."""

from collections.abc import Callable

import pytest
from autogen_core import FunctionCall
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    LLMMessage,
    UserMessage,
)
from hypothesis import given
from hypothesis import strategies as st

from app.agents.context import SessionContext, estimate_tokens, plan_start
from app.agents.encoding import encode
from app.domain.catalog import WHOLE_CONTEXT, ContextPolicy, parse_context_policy

Strings = st.text("ab 你", max_size=12)


def user(text: str = "q") -> UserMessage:
    return UserMessage(content=text, source="user")


def said(text: str = "a") -> AssistantMessage:
    return AssistantMessage(content=text, source="assistant")


def calls(arguments: str = "{}", thought: str | None = None) -> AssistantMessage:
    call = FunctionCall(id="c", name="add", arguments=arguments)
    return AssistantMessage(content=[call], thought=thought, source="assistant")


def results(text: str = "1") -> FunctionExecutionResultMessage:
    result = FunctionExecutionResult(content=text, name="add", call_id="c", is_error=False)
    return FunctionExecutionResultMessage(content=[result])


@st.composite
def paths(draw: Callable[..., object]) -> list[LLMMessage]:
    """Turns of any size: rounds of tools, answers that were cut off, a last one that still runs."""
    path: list[LLMMessage] = []
    for _ in range(draw(st.integers(1, 6))):
        path.append(user(draw(Strings)))
        for _ in range(draw(st.integers(0, 3))):
            path += [calls(draw(Strings)), results(draw(Strings))]
        if draw(st.booleans()):
            path.append(said(draw(Strings)))
    return path


policies = st.one_of(
    st.just(WHOLE_CONTEXT),
    st.builds(ContextPolicy, st.just("last"), st.integers(1, 30)),
    st.builds(ContextPolicy, st.just("tokens"), st.integers(1, 150)),
)


def start_of(path: list[LLMMessage], policy: ContextPolicy) -> int:
    return plan_start([encode(m) for m in path], [estimate_tokens(m) for m in path], policy)


def cost(messages: list[LLMMessage], policy: ContextPolicy) -> int:
    return len(messages) if policy.unit == "last" else sum(map(estimate_tokens, messages))


@given(paths(), policies)
def test_what_is_sent_is_a_whole_end_of_the_path(path: list[LLMMessage], policy: ContextPolicy) -> None:
    """It begins with a user message, has the newest one, fits the policy, and could not be longer."""
    start = start_of(path, policy)
    sent, users = path[start:], [i for i, m in enumerate(path) if isinstance(m, UserMessage)]
    assert start in users
    if policy == WHOLE_CONTEXT:
        assert start == 0
        return
    assert cost(sent, policy) <= policy.limit or start == users[-1]
    if start > 0:
        assert cost(path[users[users.index(start) - 1] :], policy) > policy.limit


@given(paths(), policies)
def test_calls_and_results_stay_together(path: list[LLMMessage], policy: ContextPolicy) -> None:
    """Every result that is sent follows its call, and every call that is sent has its result."""
    sent = path[start_of(path, policy) :]
    kinds = [
        "call" if isinstance(m.content, list) and isinstance(m, AssistantMessage) else m.type for m in sent
    ]
    after_calls = [kinds[i + 1] for i, kind in enumerate(kinds) if kind == "call"]
    assert set(after_calls) <= {"FunctionExecutionResultMessage"}
    assert kinds.count("FunctionExecutionResultMessage") == len(after_calls)


@pytest.mark.parametrize(
    ("limit", "start"), [(1, 6), (2, 6), (3, 4), (6, 4), (7, 0), (8, 0)]
)  # 7 messages: a turn with a tool, a plain one, and the input of a third
def test_last_counts_messages(limit: int, start: int) -> None:
    """At most so many, rounded down to whole turns; all of them when they fit exactly."""
    path = [user(), calls(), results(), said(), user(), said(), user()]
    assert start_of(path, ContextPolicy("last", limit)) == start


@pytest.mark.parametrize(("limit", "start"), [(1, 2), (5, 2), (14, 2), (15, 0)])
def test_tokens_counts_estimated_tokens(limit: int, start: int) -> None:
    """Three messages of five tokens fit into fifteen and not into fourteen."""
    assert start_of([user(), said(), user()], ContextPolicy("tokens", limit)) == start


def test_a_turn_that_is_too_much_alone_is_sent_whole() -> None:
    """The newest user message and all after it are sent whatever the policy says."""
    path = [user(), said(), user("x" * 1000), calls(), results()]
    assert start_of(path, ContextPolicy("tokens", 1)) == 2
    assert start_of(path, ContextPolicy("last", 1)) == 2


def test_a_path_without_a_user_message_is_not_cut() -> None:
    """There is no place where it could be."""
    assert start_of([said(), said()], ContextPolicy("last", 1)) == 0
    assert start_of([], ContextPolicy("tokens", 1)) == 0


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        (user(""), 4),
        (user("a"), 5),
        (user("abcd"), 5),
        (user("abcde"), 6),
        (user("你好世界"), 7),
        (UserMessage(content=["abcd"], source="user"), 5),
        (said("abcd"), 5),
        (calls("12345", thought="thought."), 8),
        (results("abcd"), 5),
    ],
)
def test_tokens_are_estimated(message: LLMMessage, tokens: int) -> None:
    """Four for a message and one for every four bytes of what is in it, rounded up."""
    assert estimate_tokens(message) == tokens


async def test_a_policy_leaves_the_context_alone() -> None:
    """It chooses what is shown; what the context holds, and where it ends, stays."""
    path = [user(), said(), user(), said(), user()]
    context = SessionContext(path)
    context.policy = ContextPolicy("last", 2)
    assert list(context.shown([])) == path[4:]
    assert context.mark() == 5
    await context.add_message(said("new"))
    assert list(context.shown([])) == [path[4], said("new")]
    context.replace_from(4, [])
    context.policy = WHOLE_CONTEXT
    assert list(context.shown([])) == path[:4]
    assert context.tokens == sum(map(estimate_tokens, path[:4]))


async def test_autogen_is_shown_nothing() -> None:
    """It would copy and look through the whole conversation in each call, and only carry it."""
    context = SessionContext([user()])
    assert await context.get_messages() == []


def test_policies_are_parsed() -> None:
    """The three forms of the setting."""
    assert parse_context_policy("all") == WHOLE_CONTEXT
    assert parse_context_policy("last:4") == ContextPolicy("last", 4)
    assert parse_context_policy("tokens:999999999") == ContextPolicy("tokens", 999_999_999)


@pytest.mark.parametrize(
    "text",
    [
        *("", "ALL", "all:1", " all", "first:3", "last", "last:", "last:0", "last:-1", "last:04", "last:٤"),
        *("last: 4", "last:4\n", "tokens:1.5", "tokens:1000000000"),
    ],
)
def test_other_policies_are_refused(text: str) -> None:
    """The error says what is allowed."""
    with pytest.raises(ValueError, match="all, last:<n> or tokens:<n>"):
        parse_context_policy(text)
