"""Signed tokens (JWT, RFC 7519, with the advice of RFC 8725): ``Authorization: Bearer <token>``.

The algorithm is that of the key, never what the token says; headers that point to keys elsewhere
(``jku``, ``x5u``, ``jwk``) are not looked at, and ``crit`` is refused.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt
import orjson
from cachetools import TLRUCache

from app.domain.errors import AgentPoolError, Unauthenticated
from app.domain.ids import parse_name
from app.domain.principal import Principal, principal_of
from app.identity.followed import FollowedFile
from app.ports import Clock
from app.ports.identity import RawHeaders

LEEWAY_S = 30.0
"""For clocks that differ."""
MAX_TOKEN_BYTES = 8192
REMEMBERED = 4096
"""Tokens whose signature is not checked again: 3 us instead of 45 (HS256), 107 (RS256), 135 (ES256)."""
REQUIRED = ("exp", "iat", "aud", "iss", "sub")
MIN_RSA_BITS = 2048

_BEARER = re.compile(rb"(?i:bearer) +([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+)")
# What PyJWT, and what it calls, makes of tokens that are none.
_REFUSALS = (
    jwt.PyJWTError,
    AgentPoolError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class TokenKey:
    """What a signature is checked with, and the one algorithm that it is for. Its text has no secret."""

    algorithm: str
    key: Any = field(repr=False)


KeySet = Mapping[str | None, TokenKey]
"""By ``kid``; a key under ``None`` is for tokens that name none, and for all others."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must say, and which role makes an admin."""

    audience: str
    issuer: str
    max_lifetime_s: int
    roles_claim: str = "roles"
    admin_role: str = "admin"


class Tokens:
    """Lets in who has a token that is signed with one of the keys, and valid now.

    Verified ones are remembered until they expire, or the keys change.
    """

    def __init__(self, keys: Callable[[], KeySet], rules: TokenRules, clock: Clock) -> None:
        self._get_keys = keys
        self._keys = keys()
        self._rules = rules
        self._clock = clock
        self._verified: TLRUCache[bytes, tuple[Principal, float]] = TLRUCache(
            REMEMBERED, ttu=lambda _, verified, __: verified[1], timer=self._now_s
        )

    def authenticate(self, headers: RawHeaders) -> Principal:
        given = [value for name, value in headers if name == b"authorization"]
        match = _BEARER.fullmatch(given[0]) if len(given) == 1 and len(given[0]) <= MAX_TOKEN_BYTES else None
        if match is None:
            raise Unauthenticated
        if (keys := self._get_keys()) is not self._keys:
            self._keys = keys
            self._verified.clear()
        digest = hashlib.sha256(match[1]).digest()
        verified = self._verified.get(digest)
        if verified is None:
            try:
                verified = self._verify(match[1], digest)
            except _REFUSALS as error:
                raise Unauthenticated from error
            self._verified[digest] = verified
        return verified[0]

    def _verify(self, token: bytes, digest: bytes) -> tuple[Principal, float]:
        """Return whose token it is, and until when."""
        key = self._keys.get(None) or self._keys[jwt.get_unverified_header(token).get("kid")]
        claims = jwt.decode(
            token,
            key.key,
            algorithms=[key.algorithm],
            audience=self._rules.audience,
            issuer=self._rules.issuer,
            # Times are looked at below, by the clock that everything here goes by.
            options={
                "require": list(REQUIRED),
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
                "enforce_minimum_key_length": True,
            },
        )
        ends_at = self._check_times(claims)
        is_admin = self._rules.admin_role in _roles_of(claims.get(self._rules.roles_claim))
        user_id = parse_name(claims["sub"], "sub")
        return principal_of(user_id, is_admin=is_admin, credential=f"jwt:{digest.hex()[:16]}"), ends_at

    def _check_times(self, claims: dict[str, Any]) -> float:
        now, expires, issued = self._now_s(), _time_of(claims, "exp"), _time_of(claims, "iat")
        begins = _time_of(claims, "nbf") if "nbf" in claims else issued
        if expires - issued > self._rules.max_lifetime_s:
            raise ValueError("it is valid for longer than allowed")
        if max(begins, issued) - LEEWAY_S > now or now >= expires + LEEWAY_S:
            raise ValueError("it is not valid now")
        return expires + LEEWAY_S

    def _now_s(self) -> float:
        return self._clock.now_ms() / 1000


def secret_key(secret: str) -> Callable[[], KeySet]:
    """Return the keys of those who sign with a shared secret, by HMAC with SHA-256.

    Raises:
        ValueError: it is a public key, or a JWK.
    """
    try:
        key = jwt.get_algorithm_by_name("HS256").prepare_key(secret.encode())
    except jwt.PyJWTError:
        raise ValueError("JWT_SECRET: is a key of another kind") from None
    keys: KeySet = {None: TokenKey("HS256", key)}
    return lambda: keys


def followed_keys(path: str, clock: Clock) -> Callable[[], KeySet]:
    """Return the public keys in a file with a JWK set (RFC 7517), which is followed.

    Raises:
        ValueError: it cannot be read or is none; names the setting.
    """
    return FollowedFile("JWT_JWKS_FILE", path, parse_jwks, clock).get


def parse_jwks(raw: bytes) -> KeySet:
    """Return the RS256 and ES256 keys of a JWK set, by ``kid``; those for other uses are left out.

    Raises:
        ValueError: it is none, has no such key, or one that is private, too short or named twice.
    """
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise ValueError("not JSON") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("not a JWK set")
    keys: dict[str | None, TokenKey] = {}
    for entry in entries:
        found = _find_key(entry) if isinstance(entry, dict) else None
        if found is None:
            continue
        if entry["kid"] in keys:
            raise ValueError("two keys have the same kid")
        keys[entry["kid"]] = found
    if not keys:
        raise ValueError("has no key for RS256 or ES256 that has a kid")
    return keys


def _find_key(entry: dict[str, Any]) -> TokenKey | None:
    kind, curve = entry.get("kty"), entry.get("crv")
    algorithm = "RS256" if kind == "RSA" else "ES256" if (kind, curve) == ("EC", "P-256") else None
    is_ours = isinstance(entry.get("kid"), str) and entry.get("use", "sig") == "sig"
    if algorithm is None or not is_ours or entry.get("alg", algorithm) != algorithm:
        return None
    if "d" in entry:
        raise ValueError("holds a private key; it must have public ones only")
    try:
        key = jwt.PyJWK.from_dict(entry, algorithm=algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        # Not what was wrong: that repeats the key.
        raise ValueError("holds a key that cannot be read") from None
    if algorithm == "RS256" and key.key_size < MIN_RSA_BITS:
        raise ValueError(f"holds an RSA key of less than {MIN_RSA_BITS} bits")
    return TokenKey(algorithm, key)


def _time_of(claims: dict[str, Any], name: str) -> float:
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is not a time")
    return float(value)


def _roles_of(claim: Any) -> list[Any]:
    if isinstance(claim, str):
        return claim.split()
    return claim if isinstance(claim, list) else []
