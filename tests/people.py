"""Users with API keys, for tests of who may do what."""

from datetime import UTC, datetime
from pathlib import Path

from app.identity.key_file import KeyFile, Scope

SCOPES: dict[str, Scope] = {"alice": "user", "bobby": "user", "chief": "admin"}
"""Whose keys ``make_keys`` makes. The names are as long as each other, to compare answers by the byte."""


def make_keys(folder: Path) -> tuple[str, dict[str, str]]:
    """Return a file of keys, and each user's key."""
    path = str(folder / "keys.json")
    now = datetime.now(UTC)
    return path, {
        name: KeyFile(path).create(name, scope, None, now, None)[1] for name, scope in SCOPES.items()
    }


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
