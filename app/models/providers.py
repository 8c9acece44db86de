"""Who offers models: an address, a key and what may be asked for.

Plain values; nothing here connects. A key is in no ``repr``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from app.models.address import Address

DEMO: Final = "demo"
ANY_MODEL: Final = "*"

_NAME_MAX_CHARS: Final = 200

# What AutoGen must know about a model. ``family`` "unknown" makes the library look at
# the model's name, which is what picks the message dialect of Claude, Gemini and Mistral.
# One system message is what every chat template takes; more than one is not.
_PLAIN: Final[dict[str, Any]] = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "structured_output": False,
    "family": "unknown",
    "multiple_system_messages": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a vendor without being told."""

    base_url: str
    model: str
    info: Mapping[str, Any] = field(default_factory=dict)


KNOWN: Final[Mapping[str, Known]] = {
    "openai": Known(
        base_url="https://api.openai.com/v1",
        model="gpt-5-mini",
        info={"vision": True, "structured_output": True, "multiple_system_messages": True},
    ),
    "deepseek": Known(
        base_url="https://api.deepseek.com/v1",
        model="deepseek-chat",
        info={"multiple_system_messages": True},
    ),
    "ollama": Known(base_url="http://127.0.0.1:11434/v1", model="llama3.2"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One place that offers models through OpenAI's chat completions, or the built-in demo.

    ``models`` is what may be chosen beside ``default_model``; ``"*"`` is anything.
    ``model_info`` overrides what AutoGen is told, per model; the entry ``"*"`` is for all.
    """

    name: str
    default_model: str
    base_url: str = ""
    api_key: str = field(default="", repr=False)
    models: tuple[str, ...] | Literal["*"] = ()
    model_info: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(ord(c) < 0x21 or ord(c) > 0x7E for c in self.api_key):
            raise ValueError(f"the API key of {self.name} has a character that no header may carry")

    def offers(self, model: str) -> bool:
        """Say whether ``model`` may be asked for. A name gets into logs, so even "any" has bounds."""
        if self.models != ANY_MODEL:
            return model == self.default_model or model in self.models
        return 0 < len(model) <= _NAME_MAX_CHARS and model.isprintable() and model != ANY_MODEL

    def info_of(self, model: str) -> dict[str, Any]:
        """Return what AutoGen is told about ``model``: always complete, never looked up by name."""
        known = KNOWN[self.name].info if self.name in KNOWN else {}
        return {**_PLAIN, **known, **self.model_info.get(ANY_MODEL, {}), **self.model_info.get(model, {})}

    @property
    def max_tokens_name(self) -> str:
        """What the wire calls ``max_tokens``: OpenAI's newer models refuse the name that all others want."""
        own = self.name == "openai" and self.base_url == KNOWN["openai"].base_url
        return "max_completion_tokens" if own else "max_tokens"


def make_provider(
    name: str,
    *,
    api_key: str = "",
    base_url: str | None = None,
    model: str | None = None,
    models: Sequence[str] = (),
    model_info: Mapping[str, Mapping[str, Any]] | None = None,
) -> Provider:
    """Return the provider ``name``; what is left out comes from ``KNOWN``.

    ``models`` with ``"*"`` in it offers any name. A provider that is not known needs a
    ``base_url`` and a ``model`` or ``models``, the first of which is then its default.

    Raises:
        ValueError: something is missing; the message names the provider and what, never a value.
    """
    known = KNOWN.get(name)
    url = (base_url or (known.base_url if known else "")).rstrip("/")
    named = [m for m in models if m != ANY_MODEL]
    default = model or (known.model if known else next(iter(named), ""))
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"provider {name}: base_url must begin with http:// or https://")
    try:
        Address.of(url)
    except ValueError:
        raise ValueError(f"provider {name}: base_url has no host, or a port that is none") from None
    if not default:
        raise ValueError(f"provider {name}: it needs a model")
    return Provider(
        name=name,
        base_url=url,
        api_key=api_key.strip(),
        default_model=default,
        models=ANY_MODEL if ANY_MODEL in models else tuple(named),
        model_info=model_info or {},
    )


def demo_provider() -> Provider:
    """Return the built-in demo, which needs no key and no network."""
    return Provider(name=DEMO, default_model=DEMO)
