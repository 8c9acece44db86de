"""Who offers which model, and one shared connection pool for each place that is asked.

A registry belongs to one event loop and is closed once, at shutdown. Clients are views
on a shared pool: a session's own parameters make another view, never another pool.
Importing this module imports neither openai nor AutoGen: whoever stays with the demo
never pays for them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from cachetools import LRUCache

from app.domain.catalog import ModelOffer
from app.domain.errors import UnknownModel
from app.models.limits import CallLimits
from app.models.providers import ANY_MODEL, DEMO, Provider

if TYPE_CHECKING:
    from autogen_core.models import ChatCompletionClient

ClientKind = Literal["lean", "stock"]

PARAMS: Final = ("temperature", "top_p", "max_tokens", "reasoning_effort", "seed", "stop")
_VIEWS_KEPT: Final = 1024


class Pool(Protocol):
    """The connections to one provider, and the clients that use them."""

    def client(self, model: str, params: Mapping[str, Any]) -> ChatCompletionClient: ...

    async def close(self) -> None: ...


class ModelRegistry:
    """Knows the providers and makes their clients when they are first needed.

    Times are seconds. ``attempts`` counts the first try; the wait between two grows from
    ``retry_base_s``. ``demo_delay_s`` slows the demo's words down, to watch it stream.
    """

    def __init__(
        self,
        providers: Sequence[Provider],
        default_provider: str,
        *,
        client_kind: ClientKind = "lean",
        first_event_timeout_s: float = 180.0,
        idle_timeout_s: float = 60.0,
        connect_timeout_s: float = 10.0,
        max_bytes: int = 4 * 1024 * 1024,
        attempts: int = 3,
        retry_base_s: float = 0.5,
        demo_delay_s: float = 0.0,
    ) -> None:
        self._providers = {p.name: p for p in providers}
        if default_provider not in self._providers:
            raise ValueError(f"the default provider {default_provider} is not among the providers")
        if len(self._providers) != len(providers):
            raise ValueError("two providers have the same name")
        self._default = default_provider
        self._kind = client_kind
        self._demo_delay_s = demo_delay_s
        self._limits = CallLimits(
            first_event_s=first_event_timeout_s,
            idle_s=idle_timeout_s,
            connect_s=connect_timeout_s,
            max_bytes=max_bytes,
            attempts=attempts,
            retry_base_s=retry_base_s,
        )
        self._pools: dict[str, Pool] = {}
        self._clients: dict[tuple[str, str], ChatCompletionClient] = {}
        self._views: LRUCache[Hashable, ChatCompletionClient] = LRUCache(_VIEWS_KEPT)

    def offers(self) -> tuple[ModelOffer, ...]:
        """Return everything that may be asked for, the default first; ``"*"`` after a provider's own."""
        order = sorted(self._providers.values(), key=lambda p: p.name != self._default)
        return tuple(
            ModelOffer(p.name, model, is_default=p.name == self._default and model == p.default_model)
            for p in order
            for model in _names(p)
        )

    def resolve(self, provider: str | None, model: str | None) -> tuple[str, str]:
        """Return the (provider, model) meant; ``None`` means the default.

        Raises:
            UnknownModel: it is not offered.
        """
        found = self._providers.get(provider or self._default)
        if found is None:
            raise UnknownModel
        name = model or found.default_model
        if not found.offers(name):
            raise UnknownModel
        return found.name, name

    def client_for(self, provider: str, model: str, params: Mapping[str, Any]) -> ChatCompletionClient:
        """Return the client for a model, asking with those of ``params`` that are in ``PARAMS``.

        Equal arguments get the same client while it is remembered. Making the first one of a
        provider imports its library, which takes a second: see ``preload``.

        Raises:
            UnknownModel: it is not offered.
        """
        name, model = self.resolve(provider, model)
        chosen = {key: params[key] for key in PARAMS if params.get(key) is not None}
        if not chosen:
            if (name, model) not in self._clients:
                self._clients[name, model] = self._pool(name).client(model, {})
            return self._clients[name, model]
        key = (name, model, *((k, repr(v)) for k, v in chosen.items()))
        if key not in self._views:
            self._views[key] = self._pool(name).client(model, chosen)
        return self._views[key]

    def preload(self) -> None:
        """Import what the providers need, so that no turn pays for it.

        Blocks for a second when one of them is not the demo: for the start, before serving.
        """
        for name in self._providers:
            self._pool(name)

    async def close(self) -> None:
        """Close every connection; streams under way fail. May be called twice."""
        pools, self._pools = list(self._pools.values()), {}
        self._clients.clear()
        self._views.clear()
        for pool in pools:
            await pool.close()

    def _pool(self, name: str) -> Pool:
        if name not in self._pools:
            self._pools[name] = self._open(self._providers[name])
        return self._pools[name]

    def _open(self, provider: Provider) -> Pool:
        """Make the provider's pool. Imports here, so that only those who need it pay."""
        if provider.name == DEMO:
            from app.models.demo import DemoPool

            return DemoPool(delay_s=self._demo_delay_s)
        if self._kind == "stock":
            from app.models.stock import StockPool

            return StockPool(provider, self._limits)
        from app.models.wire import LeanPool

        return LeanPool(provider, self._limits)


def _names(provider: Provider) -> list[str]:
    if provider.models == ANY_MODEL:
        return [provider.default_model, ANY_MODEL]
    return [provider.default_model, *(m for m in provider.models if m != provider.default_model)]
