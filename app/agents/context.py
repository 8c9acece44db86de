"""The model context of one live agent: a list that knows how to be cut back, and how much of it to show."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Final

from autogen_core.model_context import ChatCompletionContext
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResultMessage,
    LLMMessage,
)

from app.agents.encoding import Conversation, encode, is_user
from app.domain.catalog import WHOLE_CONTEXT, ContextPolicy

_BYTES_PER_TOKEN: Final = 4  # English text; Chinese comes out as 3 tokens for 4 characters
_TOKENS_PER_MESSAGE: Final = 4  # role and separators


class SessionContext(ChatCompletionContext):
    """Owns the messages of a session; its ``policy`` says how many the model is sent after the system prompt.

    AutoGen adds to it while a turn runs. What stands there after the turn is decided
    by ``replace_from``, so that a warm agent and a restored one hold the same. The
    policy only chooses what is shown: it never removes a message.

    AutoGen, which only carries messages from a context to a client, is shown none: the
    client takes them from ``shown``, encoded as they are.
    """

    def __init__(self, messages: Iterable[LLMMessage] = ()) -> None:
        super().__init__()
        self._encoded: list[bytes] = []
        self._tokens = array("Q")  # what each costs
        self.policy = WHOLE_CONTEXT
        self._extend(messages)

    @property
    def tokens(self) -> int:
        """About how many tokens all of it costs."""
        return sum(self._tokens)

    async def add_message(self, message: LLMMessage) -> None:
        self._extend((message,))

    async def get_messages(self) -> list[LLMMessage]:
        """Return nothing; see ``shown``."""
        return []

    def shown(self, system: Sequence[LLMMessage]) -> Conversation:
        """Return what the model is sent, ``system`` before it."""
        return Conversation(system, self._encoded[plan_start(self._encoded, self._tokens, self.policy) :])

    def mark(self) -> int:
        """Return where the context ends now."""
        return len(self._encoded)

    def replace_from(self, mark: int, messages: Iterable[LLMMessage]) -> None:
        """Put ``messages`` in the place of everything that was added since ``mark``."""
        del self._encoded[mark:], self._tokens[mark:]
        self._extend(messages)

    def _extend(self, messages: Iterable[LLMMessage]) -> None:
        for message in messages:
            self._encoded.append(encode(message))
            self._tokens.append(estimate_tokens(message))


def plan_start(encoded: Sequence[bytes], tokens: Sequence[int], policy: ContextPolicy) -> int:
    """Return the index from which on the model is sent the messages ``encoded``, which cost ``tokens``.

    It is the lowest one from which on they fit the policy, 0 or that of a user message, which
    keeps tool calls and their results together. The newest user message and all
    after it are sent even if they alone are too much.
    """
    if policy.unit == "all":
        return 0
    spent, start = 0, None
    for index in range(len(encoded) - 1, -1, -1):
        spent += 1 if policy.unit == "last" else tokens[index]
        if start is not None and spent > policy.limit:
            return start
        if is_user(encoded[index]):
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
