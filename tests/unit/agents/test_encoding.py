"""What lives with an agent is what it would be sent as, and can be read again."""

import json
from collections.abc import Callable

from autogen_core import FunctionCall
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    LLMMessage,
    SystemMessage,
    UserMessage,
)
from autogen_ext.models.openai._openai_client import to_oai_type
from hypothesis import given
from hypothesis import strategies as st

from app.agents.encoding import Conversation, encode, is_user
from app.agents.translate import AGENT_NAME, USER_SOURCE

Texts = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=20)
Names = st.text("abc", min_size=1, max_size=3)


@st.composite
def paths(draw: Callable[..., object]) -> list[LLMMessage]:
    """Anything that a session may hold, lone surrogates in it; the ids of calls are their own."""
    path: list[LLMMessage] = []
    for turn in range(draw(st.integers(0, 4))):
        path.append(UserMessage(content=draw(Texts), source=USER_SOURCE))
        for n in range(draw(st.integers(0, 2))):
            ids = [f"{turn}-{n}-{i}" for i in range(draw(st.integers(1, 3)))]
            calls = [FunctionCall(id=i, name=draw(Names), arguments=draw(Texts)) for i in ids]
            path.append(AssistantMessage(content=calls, thought=draw(st.none() | Texts), source=AGENT_NAME))
            results = [
                FunctionExecutionResult(content=draw(Texts), name=c.name, call_id=c.id, is_error=False)
                for c in calls
            ]
            path.append(FunctionExecutionResultMessage(content=results))
        path.append(AssistantMessage(content=draw(Texts), source=AGENT_NAME))
    return path


@given(paths())
def test_what_is_kept_can_be_read_again(path: list[LLMMessage]) -> None:
    """Decoded it is equal, whatever the texts are; a user message is known without decoding."""
    system = [SystemMessage(content="p")]
    conversation = Conversation(system, [encode(m) for m in path])
    assert list(conversation) == [*system, *path]
    assert len(conversation) == len(path) + 1
    assert [is_user(encode(m)) for m in path] == [isinstance(m, UserMessage) for m in path]


@given(paths())
def test_it_is_what_autogen_would_send(path: list[LLMMessage]) -> None:
    """The bytes say the same as the library's own transformers do."""
    sent = [part for m in path for part in to_oai_type(m, model="m", model_family="unknown")]
    said = json.loads(b"[%b]" % Conversation([], [encode(m) for m in path]).encoded)
    for ours, theirs in zip(said, sent, strict=True):
        assert ours == {k: v for k, v in theirs.items() if k != "name"}


def test_a_slice_is_messages() -> None:
    """Clients of AutoGen's look at the last message, or at some."""
    conversation = Conversation([], [encode(UserMessage(content=c, source=USER_SOURCE)) for c in "abc"])
    assert [m.content for m in conversation[1:]] == ["b", "c"]
    assert conversation[-1].content == "c"
