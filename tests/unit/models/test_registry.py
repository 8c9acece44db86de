"""Who offers what, and which client answers for it."""

import json
from typing import Any

import pytest
from autogen_core.models import SystemMessage, UserMessage

from app.agents.encoding import Conversation
from app.domain.catalog import ModelOffer
from app.domain.errors import UnknownModel
from app.models.library import LibraryRequests
from app.models.limits import CallLimits
from app.models.providers import KNOWN, Provider, demo_provider, make_provider
from app.models.registry import ModelRegistry
from app.models.wire import LeanPool, has_dialect

KEY = "sk-SECRET"


def registry(**changes: object) -> ModelRegistry:
    openai = make_provider("openai", api_key=KEY, models=["gpt-5", "gpt-5-mini"])
    anything = make_provider("local", base_url="http://127.0.0.1:1/v1/", model="a", models=["*"])
    return ModelRegistry([demo_provider(), openai, anything], "demo", **changes)


def test_resolving_fills_in_defaults() -> None:
    """What is left out comes from the default provider, or is the provider's default model."""
    models = registry()
    assert models.resolve(None, None) == ("demo", "demo")
    assert models.resolve("openai", None) == ("openai", "gpt-5-mini")
    assert models.resolve("openai", "gpt-5") == ("openai", "gpt-5")
    assert models.resolve("local", "whatever") == ("local", "whatever")


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("nobody", None),
        ("openai", "gpt-1"),
        ("openai", "*"),
        (None, "gpt-5"),
        ("local", "*"),
        ("local", "a\nb"),
        ("local", "x" * 201),
    ],
)
def test_what_is_not_offered_is_refused(provider: str | None, model: str | None) -> None:
    """Neither resolving nor asking for a client goes around the offers."""
    models = registry()
    with pytest.raises(UnknownModel):
        models.resolve(provider, model)
    with pytest.raises(UnknownModel):
        models.client_for(provider or "demo", model or "nothing", {})


def test_offers_begin_with_the_default() -> None:
    """Every choice is listed once, the default first and alone marked."""
    assert registry().offers() == (
        ModelOffer("demo", "demo", is_default=True),
        ModelOffer("openai", "gpt-5-mini", is_default=False),
        ModelOffer("openai", "gpt-5", is_default=False),
        ModelOffer("local", "a", is_default=False),
        ModelOffer("local", "*", is_default=False),
    )


async def test_clients_are_shared_and_parameters_make_views() -> None:
    """Equal requests get one client; other parameters another one on the same connections."""
    models = registry()
    plain = models.client_for("openai", "gpt-5", {})
    warm = models.client_for("openai", "gpt-5", {"temperature": 0.5, "max_tokens": 9})
    assert plain is models.client_for("openai", "gpt-5", {"temperature": None, "unknown": 1})
    assert warm is models.client_for("openai", "gpt-5", {"max_tokens": 9, "temperature": 0.5})
    assert warm is not plain
    assert warm._pool is plain._pool
    assert warm._create_args["max_completion_tokens"] == 9
    await models.close()


def test_max_tokens_keeps_its_name_elsewhere() -> None:
    """Only OpenAI's own address wants the newer name."""
    models = registry()
    assert models.client_for("local", "a", {"max_tokens": 9})._create_args["max_tokens"] == 9


async def test_views_are_bounded() -> None:
    """Ten thousand different parameters do not make ten thousand clients."""
    models = registry()
    for seed in range(3000):
        models.client_for("demo", "demo", {"seed": seed})
    assert len(models._views) == 1024
    await models.close()


def test_no_key_in_any_text() -> None:
    """Neither a provider nor a registry shows a key."""
    provider = make_provider("openai", api_key=KEY)
    assert KEY not in repr(provider)
    assert KEY not in repr(registry())
    with pytest.raises(ValueError, match="openai") as caught:
        make_provider("openai", api_key=f"{KEY}\u00e9")
    assert KEY not in str(caught.value)


def test_models_are_described_explicitly() -> None:
    """AutoGen's list of names, which ends in 2025, is never asked."""
    info = make_provider("openai", model="gpt-9", model_info={"gpt-9": {"vision": False}}).info_of("gpt-9")
    assert info["function_calling"] is True
    assert info["vision"] is False
    assert info["family"] == "unknown"


@pytest.mark.parametrize("name", KNOWN)
def test_known_providers_need_nothing(name: str) -> None:
    """A vendor that is known comes with address and model."""
    provider = make_provider(name)
    assert provider.offers(provider.default_model)
    assert provider.base_url == KNOWN[name].base_url


@pytest.mark.parametrize(
    "values", [{}, {"base_url": "http://x"}, {"model": "m"}, {"base_url": "x", "model": "m"}]
)
def test_an_unknown_provider_needs_an_address_and_a_model(values: dict[str, str]) -> None:
    """What is missing stops the start."""
    with pytest.raises(ValueError, match="provider mine"):
        make_provider("mine", **values)


def test_registries_refuse_what_does_not_fit() -> None:
    """A default that is not there, or one name for two, is an error at once."""
    with pytest.raises(ValueError, match="default"):
        ModelRegistry([demo_provider()], "openai")
    with pytest.raises(ValueError, match="same name"):
        ModelRegistry([demo_provider(), Provider(name="demo", default_model="d")], "demo")


def test_dialects_are_the_librarys() -> None:
    """No model that the library treats in its own way is taken for a plain one."""
    from autogen_ext.models.openai._transformation import get_transformer
    from autogen_ext.models.openai._transformation.registry import MESSAGE_TRANSFORMERS

    plain = get_transformer("openai", "", "unknown")
    special = [name for name, made in MESSAGE_TRANSFORMERS["openai"].items() if made is not plain]
    assert special
    assert all(has_dialect(name, "unknown") for name in special)
    assert not has_dialect("gpt-5-mini", "unknown")


TOOLS: list[Any] = [
    {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
    {"name": "clock", "strict": True},
]


@pytest.mark.parametrize("tools", [[], TOOLS, TOOLS[1:]])
@pytest.mark.parametrize("tool_choice", ["auto", "required", "none"])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.5, "max_tokens": 7, "stop": ["x"], "seed": 2**70}])
def test_requests_are_the_librarys(tools: list[Any], tool_choice: Any, params: dict[str, Any]) -> None:
    """What is made without the library is what it would have made, asked for twice as well."""
    provider = make_provider("x", base_url="http://localhost/v1", model="m")
    client = LeanPool(provider, CallLimits()).client("m", params)
    messages = [SystemMessage(content="p"), UserMessage(content="q", source="user")]
    made = LibraryRequests(provider, "m", params).body(messages, tools, tool_choice, None, {})
    for _ in range(2):
        body = client._body(Conversation(messages, ()), list(tools), tool_choice, None, {})
        assert json.loads(body) == made


def test_a_tool_with_a_bad_name_is_not_offered() -> None:
    """As the library has it."""
    provider = make_provider("x", base_url="http://localhost/v1", model="m")
    client = LeanPool(provider, CallLimits()).client("m", {})
    with pytest.raises(ValueError, match="Invalid name"):
        client._body(Conversation([], ()), [{"name": "a b"}], "auto", None, {})
