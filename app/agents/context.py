"""The model context of one live agent: a list that knows how to be cut back."""

from collections.abc import Iterable

from autogen_core.model_context import ChatCompletionContext
from autogen_core.models import LLMMessage


class SessionContext(ChatCompletionContext):
    """Owns the messages that the model is sent after the system prompt.

    AutoGen adds to it while a turn runs. What stands there after the turn is decided
    by ``replace_from``, so that a warm agent and a restored one hold the same.
    """

    def __init__(self, messages: Iterable[LLMMessage] = ()) -> None:
        super().__init__()
        self._messages.extend(messages)

    async def get_messages(self) -> list[LLMMessage]:
        """Return the live list, not a copy: the caller only reads it."""
        return self._messages

    def mark(self) -> int:
        """Return where the context ends now."""
        return len(self._messages)

    def replace_from(self, mark: int, messages: Iterable[LLMMessage]) -> None:
        """Put ``messages`` in the place of everything that was added since ``mark``."""
        self._messages[mark:] = messages
