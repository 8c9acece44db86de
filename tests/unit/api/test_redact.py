"""Which keys name a secret, and what becomes of the values under them."""

import pytest

from app.api.native.redact import REDACTED, names_secret, redact


@pytest.mark.parametrize(
    "key",
    [
        "api_key", "apiKey", "API-KEY", "apikey", "openai_api_key", "x-api-key", "OPENAI_API_KEY",
        "password", "Password", "db_password", "userPassword", "passwd", "password_hash", "passphrase",
        "secret", "client_secret", "clientSecret", "secrets", "secret_value",
        "token", "access_token", "accessToken", "refreshtoken", "authToken",
        "authorization", "Authorization", "proxy-authorization", "credentials", "private_key", "access-key",
    ],
)  # fmt: skip
def test_keys_that_name_a_secret(key: str) -> None:
    """Any usual spelling of a secret's name is recognised."""
    assert names_secret(key)


@pytest.mark.parametrize(
    "key",
    ["language", "max_tokens", "token_count", "tokens", "tokenizer", "key", "keyboard", "monkey", "author",
     "secretary", "passenger", "compass", "authorized", "", "密码本"],
)  # fmt: skip
def test_keys_that_do_not(key: str) -> None:
    """Words that only look alike keep their values."""
    assert not names_secret(key)


def test_values_are_replaced_at_any_depth() -> None:
    """Whole values go, structure stays, ``null`` stays a deletion."""
    given = {"a": [{"token": {"x": 1}}, 2], "password": "p", "secret": None, "ok": {"api_key": 7, "n": 1}}
    assert redact(given) == {
        "a": [{"token": REDACTED}, 2],
        "password": REDACTED,
        "secret": None,
        "ok": {"api_key": REDACTED, "n": 1},
    }
