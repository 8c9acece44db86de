"""API keys: ``Authorization: Bearer <key>``, or ``X-API-Key: <key>``."""

import hashlib
import hmac
import re
from dataclasses import dataclass

from app.domain.errors import Unauthenticated
from app.domain.principal import NOBODY, Principal, principal_of
from app.identity.followed import FollowedFile
from app.identity.key_file import KEY, parse_keys
from app.ports import Clock
from app.ports.identity import RawHeaders

_HEADERS = {
    b"authorization": re.compile(rb"(?i:bearer) +(" + KEY.pattern + rb")"),
    b"x-api-key": re.compile(rb"(" + KEY.pattern + rb")"),
}


@dataclass(frozen=True, slots=True)
class _Known:
    """``ends_at`` is in milliseconds since the epoch; 0: it does not count."""

    digest: bytes
    principal: Principal
    ends_at: float


_UNKNOWN = _Known(bytes(hashlib.sha256().digest_size), NOBODY, 0)


class ApiKeys:
    """Lets in who has one of the keys in the file, which is followed.

    How long it takes to refuse a key says nothing of it: it is found by its id, which is no secret,
    and its digest is compared in constant time, also that of an id that is not there.

    Raises:
        ValueError: the file cannot be read; names the setting.
    """

    def __init__(self, path: str, clock: Clock) -> None:
        self._clock = clock
        self._file = FollowedFile("API_KEYS_FILE", path, _index, clock)

    def authenticate(self, headers: RawHeaders) -> Principal:
        given = [pattern.fullmatch(value) for name, value in headers if (pattern := _HEADERS.get(name))]
        if len(given) != 1 or (match := given[0]) is None:
            raise Unauthenticated
        known = self._file.get().get(match[2], _UNKNOWN)
        is_it = hmac.compare_digest(hashlib.sha256(match[1]).digest(), known.digest)
        if not is_it or self._clock.now_ms() >= known.ends_at:
            raise Unauthenticated
        return known.principal


def _index(raw: bytes) -> dict[bytes, _Known]:
    known: dict[bytes, _Known] = {}
    for key in parse_keys(raw):
        ends_at = float("inf") if key.expires_at is None else key.expires_at.timestamp() * 1000
        principal = principal_of(key.user_id, is_admin=key.scope == "admin", credential=f"key:{key.id}")
        known[key.id.encode()] = _Known(bytes.fromhex(key.sha256), principal, 0 if key.revoked else ends_at)
    return known
