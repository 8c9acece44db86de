"""The settings: environment and ``.env`` in, plain values for each part out.

Only ``runtime``, ``main`` and ``cli`` read them. Each field is an environment
variable of the same name in capitals, in the order of ``.env.example``.
"""

import os
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.api.hosts import Hosts
from app.domain.catalog import parse_context_policy
from app.domain.session import LifeSpan
from app.models.providers import DEMO, Provider, demo_provider, make_provider
from app.pool.limits import PoolLimits
from app.stores.counting import MEMORY, REDIS_SCHEMES
from app.telemetry.redaction import secrets_in_url

if TYPE_CHECKING:
    from app.ports import Clock
    from app.ports.identity import Authenticator
    from app.stores.keyring import KeyRing

Names = Annotated[tuple[str, ...], NoDecode]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
_ENV_FILE = ".env"
_HOST = r"(\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]\\]+)"
_ORIGIN = r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?"
JWT_SECRET_MIN_BYTES = 32
"""As long as what HMAC with SHA-256 makes (RFC 7518, 3.2)."""
_KNOWN_VENDORS = ("openai", "deepseek", "ollama")


class ProviderSetting(BaseModel):
    """One entry of ``MODEL_PROVIDERS``; ``models`` maps each name to what AutoGen is told of it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    base_url: str
    api_key_env: str | None = None
    models: dict[str, dict[str, Any]] = Field(min_length=1)


class Settings(BaseSettings):
    """Everything that can be set. Arguments win over the environment, that over ``.env``.

    Raises:
        pydantic.ValidationError: a value is wrong; it names the setting and what is allowed.
    """

    model_config = SettingsConfigDict(
        env_file=_ENV_FILE,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    alias_prefixes: Names = ("/api", "/agent_backend")

    store_url: str = "sqlite:///./agentpool.db"
    accept_volatile: bool = False
    store_fsync_wait_ms: int = Field(default=0, ge=0, le=900)
    lease_s: float = Field(default=30.0, ge=1, le=3600)
    node_url: str | None = None
    node_listen: str | None = None

    model_provider: str | None = None
    model_name: str | None = None
    model_providers: dict[str, ProviderSetting] = Field(default_factory=dict)
    openai_api_key: SecretStr | None = None
    openai_base_url: str | None = None
    openai_model: str | None = None
    openai_models: Names = ()
    deepseek_api_key: SecretStr | None = None
    deepseek_base_url: str | None = None
    deepseek_model: str | None = None
    deepseek_models: Names = ()
    ollama_api_key: SecretStr | None = None
    ollama_base_url: str | None = None
    ollama_model: str | None = None
    ollama_models: Names = ()
    model_client: Literal["lean", "stock"] = "lean"
    model_first_event_timeout_s: Seconds = 180.0
    model_idle_timeout_s: Seconds = 60.0
    model_max_bytes: int = Field(default=4 << 20, ge=1024, le=1 << 30)

    agent_max_instances: int = Field(default=100, ge=1, le=1_000_000)
    agent_ttl_seconds: float = Field(default=3600.0, ge=0, le=315_360_000)
    agent_cleanup_interval: Seconds = 300.0
    agent_capacity_wait_s: float = Field(default=5.0, ge=0, le=3600)
    agent_capacity_queue: int = Field(default=1000, ge=0, le=1_000_000)

    session_queue_depth: int = Field(default=4, ge=0, le=10_000)
    session_queue_wait_s: Seconds = 30.0
    turn_timeout_s: Seconds = 300.0
    tool_timeout_s: Seconds = 120.0

    stream_replay_s: Seconds = 300.0
    stream_replay_bytes: int = Field(default=64 << 20, ge=0)
    stream_heartbeat_s: Seconds = 15.0

    session_idle_after_s: int = Field(default=1800, ge=0)
    session_ttl_s: int = Field(default=2_592_000, ge=0)
    session_retention_s: int = Field(default=604_800, ge=0)
    session_auto_create: bool = True
    session_max_per_user: int = Field(default=0, ge=0, le=1_000_000)
    session_limit_policy: Literal["evict_oldest", "reject"] = "evict_oldest"
    session_event_limit: int = Field(default=0, ge=0, le=10_000_000)

    auto_checkpoint_every: int = Field(default=0, ge=0, le=1_000_000)
    checkpoint_keep: int = Field(default=50, ge=1, le=10_000)
    context_policy: str = "all"
    compact_after_tokens: int = Field(default=0, ge=0, le=1_000_000_000)
    agents_file: str | None = None
    app_name: str = Field(default="default", min_length=1, max_length=128)

    max_body_bytes: int = Field(default=1 << 20, ge=1024, le=1 << 30)
    max_message_chars: int = Field(default=100_000, ge=1)
    redact_keys: bool = True

    auth_mode: Literal["none", "api_key", "jwt"] = "none"
    api_keys_file: str = "./agentpool-keys.json"
    jwt_secret: SecretStr | None = None
    jwt_jwks_file: str | None = None
    jwt_audience: str | None = None
    jwt_issuer: str | None = None
    jwt_max_lifetime_s: int = Field(default=86_400, ge=1, le=31_536_000)
    jwt_roles_claim: str = Field(default="roles", min_length=1, max_length=128)
    jwt_admin_role: str = Field(default="admin", min_length=1, max_length=128)
    audit_file: str | None = None

    user_requests_per_minute: int = Field(default=0, ge=0, le=10_000_000)
    user_concurrent_turns: int = Field(default=0, ge=0, le=1_000_000)
    user_tokens_per_day: int = Field(default=0, ge=0, le=1_000_000_000_000)
    rate_limit_url: str | None = None
    overload_lag_ms: int = Field(default=50, ge=0, le=60_000)

    encryption_keys: SecretStr | None = None

    drain_timeout_s: float = Field(default=25.0, ge=0, le=3600)
    allowed_hosts: Names = ()
    cors_origins: Names = ()
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator(
        "alias_prefixes",
        "openai_models",
        "deepseek_models",
        "ollama_models",
        "allowed_hosts",
        "cors_origins",
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator(
        "log_level", "auth_mode", "model_client", "log_format", "session_limit_policy", mode="before"
    )
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("alias_prefixes")
    @classmethod
    def _check_prefixes(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        if any(not prefix.startswith("/") or prefix.endswith("/") for prefix in prefixes):
            raise ValueError("each prefix begins with a slash and does not end with one")
        return prefixes

    @field_validator("node_url")
    @classmethod
    def _check_node_url(cls, url: str | None) -> str | None:
        match = re.fullmatch(rf"http://{_HOST}(:[0-9]{{1,5}})?/?", url or "http://host")
        if match is None or not 0 < int((match[2] or ":80")[1:]) <= 65_535:
            raise ValueError("must be http://host:port")
        return url.rstrip("/") if url else None

    @field_validator("node_listen")
    @classmethod
    def _check_node_listen(cls, address: str | None) -> str | None:
        if address and not re.fullmatch(rf"{_HOST}:[0-9]{{1,5}}", address):
            raise ValueError("must be host:port")
        return address or None

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        Hosts(names)
        return names

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in origins and len(origins) > 1:
            raise ValueError("* stands alone: it lets every origin in")
        if not all(origin == "*" or re.fullmatch(_ORIGIN, origin) for origin in origins):
            raise ValueError("each is *, or as browsers write it: scheme://host or scheme://host:port")
        return origins

    @field_validator("context_policy")
    @classmethod
    def _check_policy(cls, text: str) -> str:
        parse_context_policy(text)
        return text

    @model_validator(mode="after")
    def _check_parts(self) -> "Settings":
        providers = {provider.name for provider in self.providers()}
        if self.default_provider not in providers:
            raise ValueError(
                f"MODEL_PROVIDER must be demo, openai, deepseek, ollama or a name from MODEL_PROVIDERS"
                f" (configured: {', '.join(sorted(providers))})"
            )
        self.pool_limits()
        self.key_ring()
        if self.auth_mode == "jwt":
            self._check_jwt()
        return self

    @property
    def is_store_shared(self) -> bool:
        """Whether several processes can use the store."""
        return self.store_url.partition("://")[0] not in ("memory", "sqlite")

    @property
    def counter_url(self) -> str:
        """Where requests are counted: where the store is, if that can count."""
        if self.rate_limit_url:
            return self.rate_limit_url
        return self.store_url if self.store_url.startswith(REDIS_SCHEMES) else MEMORY

    @property
    def default_provider(self) -> str:
        """The provider of sessions that choose none."""
        return self.model_provider or ("openai" if _is_set(self.openai_api_key) else DEMO)

    def providers(self) -> list[Provider]:
        """Return what the operator offers: the default, every vendor with a key or an address, and more.

        Raises:
            ValueError: a provider is incomplete; names it.
        """
        found = [self._vendor(name) for name in _KNOWN_VENDORS if self._offers_vendor(name)]
        found += [self._other(name, setting) for name, setting in self.model_providers.items()]
        if self.default_provider == DEMO:
            found.insert(0, demo_provider())
        return found

    def key_ring(self) -> "KeyRing | None":
        """Return the keys for what is stored, ``None`` if it is not to be encrypted.

        Raises:
            ValueError: they are none; never repeats one.
        """
        if not (text := _reveal(self.encryption_keys)):
            return None
        from app.stores.keyring import KeyRing  # with a library of C, for those who encrypt

        try:
            return KeyRing.parse(text)
        except ValueError as error:
            raise ValueError(f"ENCRYPTION_KEYS: {error}") from None

    def authenticator(self, clock: "Clock") -> "Authenticator | None":
        """Return what lets callers in, ``None`` if nobody is asked.

        Raises:
            ValueError: the file of keys cannot be used; names the setting.
        """
        if self.auth_mode == "none":
            return None
        if self.auth_mode == "api_key":
            from app.identity.api_keys import ApiKeys

            return ApiKeys(self.api_keys_file, clock)
        from app.identity.tokens import TokenRules, Tokens, followed_keys, secret_key  # with cryptography

        keys = (
            followed_keys(self.jwt_jwks_file, clock) if self.jwt_jwks_file else secret_key(self._jwt_secret)
        )
        rules = TokenRules(
            audience=self.jwt_audience or "",
            issuer=self.jwt_issuer or "",
            max_lifetime_s=self.jwt_max_lifetime_s,
            roles_claim=self.jwt_roles_claim,
            admin_role=self.jwt_admin_role,
        )
        return Tokens(keys, rules, clock)

    def secrets(self) -> list[str]:
        """Return all that must not be told: keys, passwords in URLs, each part of a ring."""
        values = [getattr(self, name) for name in type(self).model_fields]
        secrets = [value.get_secret_value() for value in values if isinstance(value, SecretStr)]
        secrets += _reveal(self.encryption_keys).split(",")
        for provider in self.providers():
            secrets += [provider.api_key, *secrets_in_url(provider.base_url)]
        for url in (self.store_url, self.rate_limit_url):
            secrets += secrets_in_url(url)
        return sorted({secret.strip() for secret in secrets} - {""})

    def life_span(self) -> LifeSpan:
        return LifeSpan(
            self.session_idle_after_s, self.session_ttl_s, self.session_retention_s, self.session_event_limit
        )

    def pool_limits(self) -> PoolLimits:
        return PoolLimits(
            max_instances=self.agent_max_instances,
            idle_ttl_s=self.agent_ttl_seconds,
            capacity_wait_s=self.agent_capacity_wait_s,
            capacity_queue=self.agent_capacity_queue,
            queue_depth=self.session_queue_depth,
            queue_wait_s=self.session_queue_wait_s,
        )

    @property
    def _jwt_secret(self) -> str:
        return self.jwt_secret.get_secret_value() if self.jwt_secret is not None else ""

    def _check_jwt(self) -> None:
        if bool(self._jwt_secret) == bool(self.jwt_jwks_file):
            raise ValueError("AUTH_MODE jwt needs either JWT_SECRET or JWT_JWKS_FILE, and not both")
        if self._jwt_secret and len(self._jwt_secret.encode()) < JWT_SECRET_MIN_BYTES:
            raise ValueError(f"JWT_SECRET must have at least {JWT_SECRET_MIN_BYTES} bytes")
        if not self.jwt_audience or not self.jwt_issuer:
            raise ValueError("AUTH_MODE jwt needs JWT_AUDIENCE and JWT_ISSUER")

    def _offers_vendor(self, name: str) -> bool:
        given = (getattr(self, f"{name}_base_url"), getattr(self, f"{name}_model"))
        return self.default_provider == name or _is_set(getattr(self, f"{name}_api_key")) or any(given)

    def _vendor(self, name: str) -> Provider:
        chosen = self.model_name if name == self.default_provider else None
        return make_provider(
            name,
            api_key=_reveal(getattr(self, f"{name}_api_key")),
            base_url=getattr(self, f"{name}_base_url") or None,
            model=chosen or getattr(self, f"{name}_model") or None,
            models=getattr(self, f"{name}_models"),
        )

    def _other(self, name: str, setting: ProviderSetting) -> Provider:
        chosen = self.model_name if name == self.default_provider else None
        return make_provider(
            name,
            api_key=_read_variable(setting.api_key_env) if setting.api_key_env else "",
            base_url=setting.base_url,
            model=chosen,
            models=tuple(setting.models),
            model_info=setting.models,
        )


def _read_variable(name: str) -> str:
    return os.environ.get(name) or dotenv_values(_ENV_FILE).get(name) or ""


def _is_set(secret: SecretStr | None) -> bool:
    return bool(_reveal(secret))


def _reveal(secret: SecretStr | None) -> str:
    return secret.get_secret_value().strip() if secret is not None else ""
