"""The model context of one live agent: a list that knows how to be cut back, and how much of it to show."""

from collections.abc import Iterable
from typing import Final

from autogen_core.model_context import ChatCompletionContext
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResultMessage,
    LLMMessage,
    UserMessage,
)

from app.domain.catalog import WHOLE_CONTEXT, ContextPolicy

_BYTES_PER_TOKEN: Final = 4  # English text; Chinese comes out as 3 tokens for 4 characters
_TOKENS_PER_MESSAGE: Final = 4  # role and separators


class SessionContext(ChatCompletionContext):
    """Owns the messages of a session; its ``policy`` says how many the model is sent after the system prompt.

    AutoGen adds to it while a turn runs. What stands there after the turn is decided
    by ``replace_from``, so that a warm agent and a restored one hold the same. The
    policy only chooses what is shown: it never removes a message.
    """

    def __init__(self, messages: Iterable[LLMMessage] = ()) -> None:
        super().__init__()
        self._messages.extend(messages)
        self.policy = WHOLE_CONTEXT

    async def get_messages(self) -> list[LLMMessage]:
        """Return what the model is sent. All of it is the live list: the caller only reads it."""
        start = plan_start(self._messages, self.policy)
        return self._messages[start:] if start else self._messages

    def mark(self) -> int:
        """Return where the context ends now."""
        return len(self._messages)

    def replace_from(self, mark: int, messages: Iterable[LLMMessage]) -> None:
        """Put ``messages`` in the place of everything that was added since ``mark``."""
        self._messages[mark:] = messages


def plan_start(messages: list[LLMMessage], policy: ContextPolicy) -> int:
    """Return the index from which on the model is sent ``messages``.

    It is the lowest one from which on they fit the policy, 0 or that of a user message, which
    keeps tool calls and their results together. The newest user message and all
    after it are sent even if they alone are too much.
    """
    if policy.unit == "all":
        return 0
    spent, start = 0, None
    for index in range(len(messages) - 1, -1, -1):
        spent += 1 if policy.unit == "last" else estimate_tokens(messages[index])
        if start is not None and spent > policy.limit:
            return start
        if isinstance(messages[index], UserMessage):
            start = index
    return 0


def estimate_tokens(message: LLMMessage) -> int:
    """Return about how many tokens ``message`` costs: 4, and one for every 4 bytes of UTF-8.

    An estimate for a budget, not for a bill: exact counts differ between models, and
    need vocabularies that would have to be downloaded.
    """
    size = sum(_bytes_of(text) for text in _texts(message))
    return _TOKENS_PER_MESSAGE - (-size // _BYTES_PER_TOKEN)


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _texts(message: LLMMessage) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    if isinstance(message, AssistantMessage):
        calls = [call.name + call.arguments for call in message.content]
        return [message.thought or "", *calls]
    if isinstance(message, FunctionExecutionResultMessage):
        return [result.content for result in message.content]
    return [part for part in message.content if isinstance(part, str)]
