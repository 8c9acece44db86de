"""Keeping secrets out of what is stored: values under keys that name one."""

import re
from typing import Any

REDACTED = "[redacted]"

_HUMPS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SEPARATORS = re.compile(r"[^a-z0-9]+")
# Words of a key, joined by "_". A token at the end is a secret (access_token),
# elsewhere it is usually a count (token_limit), as it is in the plural (max_tokens).
_SECRET_KEY = re.compile(
    r"(?:^|_)(?:pass(?:word|wd|phrase)s?|secrets?|authorization|credentials?"
    r"|(?:api|access|private|signing|encryption)_?keys?)(?:_|$)"
    r"|(?:password|passwd|secret|token|apikey|authorization)$"
)


def redact(value: Any) -> Any:
    """Return the JSON value with ``"[redacted]"`` under each key that names a secret.

    ``null`` stays: in a merge patch it takes the key away.
    """
    if isinstance(value, dict):
        return {k: REDACTED if v is not None and names_secret(k) else redact(v) for k, v in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return value


def names_secret(key: str) -> bool:
    """Whether a value under ``key`` must not be stored."""
    words = _SEPARATORS.sub("_", _HUMPS.sub("_", key).lower())
    return _SECRET_KEY.search(words.strip("_")) is not None
