"""Where the agents get their models from: what they need, in their words."""

from collections.abc import Mapping
from typing import Any, Protocol

from autogen_core.models import ChatCompletionClient

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
