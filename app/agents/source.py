"""Where the agents get their models from: what they need, in their words."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from autogen_core import CancellationToken
from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage
from autogen_core.tools import Tool, ToolSchema

from app.domain.catalog import ModelOffer


class ModelSource(Protocol):
    """Offers models and hands out clients, which it owns: nobody else closes them.

    A client's streams fail with ``ModelUnavailable``, ``ModelRateLimited`` or
    ``ModelError`` only, and end with a ``CreateResult`` that has been found good.
    """

    def offers(self) -> tuple[ModelOffer, ...]:
        """Return everything that may be asked for, the default first."""

    def resolve(self, provider: str | None, model: str | None) -> tuple[str, str]:
        """Return the (provider, model) meant; ``None`` means the default.

        Raises:
            UnknownModel: it is not offered.
        """

    def client_for(self, provider: str, model: str, params: Mapping[str, Any]) -> ChatCompletionClient:
        """Return a client for a resolved model that asks with ``params``; cheap, shared.

        Raises:
            UnknownModel: it is not offered.
        """


@runtime_checkable
class Teller(Protocol):
    """A client that can be heard without a generator, which would wake its task for every token."""

    async def tell(
        self,
        hear: Callable[[str], None],
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = (),
        tool_choice: Any = "auto",
        json_output: Any = None,
        extra_create_args: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
    ) -> CreateResult:
        """Have ``hear`` called with text as it comes, and return the result.

        ``hear`` may be called from callbacks of the event loop, but never after this has ended.
        """
