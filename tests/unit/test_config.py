"""The settings: where they come from, what they refuse, and what says so."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.config import Settings
from tests.fakes import FakeClock

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_example_lists_every_setting_in_order():
    """``.env.example`` names every field of ``Settings`` once, in the same order."""
    listed = re.findall(r"^# ([A-Z][A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert listed == [name.upper() for name in Settings.model_fields]


def test_example_shows_the_defaults(tmp_path):
    """Uncommenting the whole example changes nothing."""
    text = re.sub(r"^# ([A-Z][A-Z_]+=)", r"\1", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)
    vendors = re.compile(r"^(OPENAI|DEEPSEEK|OLLAMA)_(BASE_URL|MODEL)=.*$", re.MULTILINE)
    (tmp_path / ".env").write_text(vendors.sub("", text))
    assert Settings() == Settings(_env_file=None)


def test_arguments_win_over_environment_over_file(tmp_path, monkeypatch):
    """Precedence is argument, environment, ``.env``, default."""
    (tmp_path / ".env").write_text("PORT=1111\nHOST=127.0.0.2\nAGENT_MAX_INSTANCES=7\n")
    monkeypatch.setenv("PORT", "2222")
    monkeypatch.setenv("HOST", "127.0.0.3")
    settings = Settings(port=3333)
    assert (settings.port, settings.host, settings.agent_max_instances) == (3333, "127.0.0.3", 7)
    assert settings.agent_ttl_seconds == 3600


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "abc"),
        ("PORT", "70000"),
        ("AGENT_MAX_INSTANCES", "0"),
        ("AGENT_TTL_SECONDS", "-1"),
        ("AGENT_TTL_SECONDS", "inf"),
        ("TURN_TIMEOUT_S", "nan"),
        ("MODEL_CLIENT", "fast"),
        ("AUTH_MODE", "open"),
        ("ALIAS_PREFIXES", "api"),
        ("CONTEXT_POLICY", "last"),
        ("CONTEXT_POLICY", "tokens:0"),
        ("LOG_LEVEL", "loud"),
        ("NODE_URL", "https://host:1"),
        ("NODE_URL", "host:1"),
        ("NODE_URL", "http://"),
        ("NODE_URL", "http://:1"),
        ("NODE_URL", "http://host:abc"),
        ("NODE_URL", "http://host:"),
        ("NODE_URL", "http://host:0"),
        ("NODE_URL", "http://host:65536"),
        ("NODE_URL", "http://::1:8000"),
        ("NODE_URL", "http://someone:hidden@host:1"),
        ("NODE_URL", "http://host:1/path"),
        ("NODE_URL", "http://host:1?"),
        ("NODE_URL", "http://host:1#part"),
        ("NODE_LISTEN", "host"),
        ("NODE_LISTEN", "http://host:1"),
        ("NODE_LISTEN", "::1:8000"),
        ("ALLOWED_HOSTS", "*"),
        ("ALLOWED_HOSTS", "good.example,http://host"),
        ("ALLOWED_HOSTS", "host:8000"),
        ("CORS_ORIGINS", "*,https://a.example"),
        ("CORS_ORIGINS", "https://a.example/"),
        ("CORS_ORIGINS", "https://user:secret@a.example"),
        ("CORS_ORIGINS", "https://*.a.example"),
        ("CORS_ORIGINS", "a.example"),
        ("CORS_ORIGINS", "null"),
        ("CORS_ORIGINS", "https://A.example"),
        ("CORS_ORIGINS", "file:///a"),
        ("MODEL_PROVIDERS", "{"),
        ("MODEL_PROVIDERS", '{"x": {"base_url": "http://127.0.0.1"}}'),
    ],
)
def test_wrong_value_is_refused_by_name(monkeypatch, name, value):
    """A wrong value stops the start and the error names the setting."""
    monkeypatch.setenv(name, value)
    with pytest.raises(Exception) as caught:
        Settings()
    assert name.lower() in str(caught.value).lower()


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://host", "http://host"),
        ("http://10.0.0.2:1/", "http://10.0.0.2:1"),
        ("http://[fe80::1]:65535", "http://[fe80::1]:65535"),
        ("", None),
    ],
)
def test_node_url_is_a_host_and_a_port(url, kept):
    """Where other nodes reach this one is kept without a slash at its end."""
    assert Settings(node_url=url).node_url == kept


def test_origins_are_as_browsers_write_them():
    """A scheme, a host and perhaps a port; or all of them."""
    origins = ("https://a.example", "http://localhost:5173", "http://[::1]:8000", "tauri://localhost")
    assert Settings(cors_origins=",".join(origins)).cors_origins == origins
    assert Settings(cors_origins="*").cors_origins == ("*",)


def test_error_never_shows_a_secret(monkeypatch):
    """A wrong setting beside a key does not print the key, nor its own value."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-12345")
    monkeypatch.setenv("PORT", "canary-port")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "canary" not in str(caught.value)
    assert "canary" not in repr(Settings(port=1))


def test_default_provider_follows_the_key(monkeypatch):
    """Without a key the demo answers; with OpenAI's key OpenAI does."""
    assert Settings().default_provider == "demo"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    assert Settings().default_provider == "openai"
    assert [p.name for p in Settings().providers()] == ["openai"]


def test_unknown_provider_is_refused(monkeypatch):
    """MODEL_PROVIDER must name something that is configured."""
    monkeypatch.setenv("MODEL_PROVIDER", "zork")
    with pytest.raises(ValidationError, match="MODEL_PROVIDER"):
        Settings()


def test_other_provider_reads_its_key_from_the_named_variable(tmp_path, monkeypatch):
    """``api_key_env`` is looked up in the environment, then in ``.env``."""
    monkeypatch.setenv(
        "MODEL_PROVIDERS", '{"mine": {"base_url": "http://h/v1", "api_key_env": "K", "models": {"m": {}}}}'
    )
    monkeypatch.setenv("MODEL_PROVIDER", "mine")
    (tmp_path / ".env").write_text("K=from-file\n")
    (provider,) = Settings().providers()
    assert (provider.name, provider.default_model, provider.api_key) == ("mine", "m", "from-file")
    monkeypatch.setenv("K", "from-env")
    assert Settings().providers()[0].api_key == "from-env"


JWT = {
    "AUTH_MODE": "jwt",
    "JWT_SECRET": "s" * 32,
    "JWT_AUDIENCE": "agentpool",
    "JWT_ISSUER": "https://id.example",
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"JWT_SECRET": "canary"}, "JWT_SECRET must have at least 32 bytes"),
        ({"JWT_SECRET": "s" * 31}, "JWT_SECRET must have at least 32 bytes"),
        ({"JWT_SECRET": ""}, "needs either JWT_SECRET or JWT_JWKS_FILE"),
        ({"JWT_JWKS_FILE": "keys.json"}, "needs either JWT_SECRET or JWT_JWKS_FILE, and not both"),
        ({"JWT_AUDIENCE": ""}, "JWT_AUDIENCE"),
        ({"JWT_ISSUER": ""}, "JWT_ISSUER"),
        ({"JWT_MAX_LIFETIME_S": "0"}, "JWT_MAX_LIFETIME_S"),
    ],
)
def test_tokens_need_all_that_they_are_judged_by(monkeypatch, change, named):
    """What is missing, contradictory or too short is named, and a secret is not repeated."""
    for name, value in (JWT | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=f"(?i){named}") as caught:
        Settings()
    assert "canary" not in str(caught.value)


def test_a_secret_is_counted_in_bytes(monkeypatch):
    """Sixteen letters of two bytes are enough; so are a file's keys without a secret."""
    for name, value in (JWT | {"JWT_SECRET": "é" * 16}).items():
        monkeypatch.setenv(name, value)
    assert Settings().auth_mode == "jwt"
    monkeypatch.setenv("JWT_SECRET", "")
    monkeypatch.setenv("JWT_JWKS_FILE", "keys.json")
    with pytest.raises(ValueError, match=r"^JWT_JWKS_FILE: keys.json cannot be read: No such file"):
        Settings().authenticator(FakeClock())


def test_nobody_is_asked_unless_it_is_said():
    """There is no authenticator by default, whatever other settings there are."""
    assert Settings().authenticator(FakeClock()) is None
    assert Settings(jwt_secret="s" * 32, api_keys_file="none").authenticator(FakeClock()) is None
