"""Idempotency keys: the same request sent twice makes one turn.

A key belongs to its owner. It is bound when a turn is accepted and stored with
that turn; a turn that fails, or that is dropped, releases it.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from app.domain.errors import InvalidInput

KEY_PATTERN = r"^[\x21-\x7e]{1,128}$"
_KEY = re.compile(r"[\x21-\x7e]{1,128}\Z")
FINGERPRINT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Binding:
    """A key, and what tells whether another request with it is the same one."""

    owner: str
    key: str
    fingerprint: bytes


def parse_key(text: str) -> str:
    """Return ``text`` if it may be an idempotency key.

    Raises:
        InvalidInput: it is not 1 to 128 visible ASCII characters.
    """
    if not _KEY.match(text):
        raise InvalidInput("Idempotency-Key", "must be 1 to 128 visible ASCII characters")
    return text


def fingerprint(*parts: Any) -> bytes:
    """Return 16 bytes of the SHA-256 of JSON values: equal parts, equal fingerprint."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).digest()[:FINGERPRINT_BYTES]
