"""Signed tokens: which are let in, and for whom."""

import base64
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from app.domain.errors import Unauthenticated
from app.domain.principal import Principal
from app.identity import tokens
from app.identity.tokens import TokenRules, Tokens, followed_keys, parse_jwks, secret_key
from tests.fakes import EPOCH_MS, FakeClock

SECRET = "s" * 32
NOW = EPOCH_MS // 1000
RULES = TokenRules(audience="agentpool", issuer="https://id.example", max_lifetime_s=3600)
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
SMALL_RSA = rsa.generate_private_key(public_exponent=65537, key_size=1024)
EC = ec.generate_private_key(ec.SECP256R1())
OTHER_EC = ec.generate_private_key(ec.SECP256R1())
PUBLIC = {"r": ("RS256", RSA), "e": ("ES256", EC)}
Claims = dict[str, Any]


def claims(**changes: Any) -> Claims:
    said: Claims = {
        "sub": "alice",
        "aud": "agentpool",
        "iss": "https://id.example",
        "iat": NOW,
        "exp": NOW + 600,
    } | changes
    return {name: value for name, value in said.items() if value is not ...}


def sign(said: Claims, key: Any = SECRET, algorithm: str = "HS256", **headers: Any) -> bytes:
    return jwt.encode(said, key, algorithm=algorithm, headers=headers).encode()


def sign_by_hand(header: Claims, said: Claims, secret: bytes = SECRET.encode()) -> bytes:
    """Return a token with an HMAC, also one that the library would not make."""
    signed = b".".join(base64url(json.dumps(part).encode()) for part in (header, said))
    return signed + b"." + base64url(hmac.digest(secret, signed, "sha256"))


def base64url(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def jwk(kid: str, key: Any, **more: Any) -> Claims:
    algorithm = jwt.algorithms.RSAAlgorithm if hasattr(key, "key_size") and key.key_size >= 1024 else None
    kind: Any = algorithm or jwt.algorithms.ECAlgorithm
    return {**kind.to_jwk(key.public_key(), as_dict=True), "kid": kid, **more}


def jwks(*entries: Claims) -> bytes:
    return json.dumps({"keys": list(entries)}).encode()


def make(clock: FakeClock | None = None, rules: TokenRules = RULES) -> Tokens:
    return Tokens(secret_key(SECRET), rules, clock or FakeClock())


def enter(door: Tokens, token: bytes) -> Principal:
    return door.authenticate([(b"host", b"x"), (b"authorization", b"Bearer " + token)])


def is_refused(door: Tokens, token: bytes) -> bool:
    try:
        enter(door, token)
    except Unauthenticated:
        return True
    return False


@pytest.fixture
def public(tmp_path: Path) -> Tokens:
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks(*(jwk(kid, key) for kid, (_, key) in PUBLIC.items())))
    clock = FakeClock()
    return Tokens(followed_keys(str(path), clock), RULES, clock)


def test_a_token_stands_for_its_subject() -> None:
    """The owner is ``sub``; without the role nobody is an admin; the audit log can name the token."""
    who = enter(make(), sign(claims()))
    assert (who.owner, who.user_id, who.is_admin) == ("alice", "alice", False)
    assert who.credential.startswith("jwt:")
    assert len(who.credential) == 20


@pytest.mark.parametrize(
    ("roles", "is_admin"),
    [
        (["admin"], True),
        (["reader", "admin"], True),
        ("admin", True),
        ("reader admin", True),
        ([], False),
        ("administrator", False),
        (["Admin"], False),
        ({"admin": True}, False),
        (True, False),
        ([["admin"]], False),
        (None, False),
    ],
)
def test_a_role_makes_an_admin(roles: object, is_admin: bool) -> None:
    """In a list or separated by spaces, and only as it is set."""
    assert enter(make(), sign(claims(roles=roles))).is_admin is is_admin


def test_claim_and_role_are_set_by_the_operator() -> None:
    """Another claim, another role."""
    rules = TokenRules("agentpool", "https://id.example", 3600, roles_claim="groups", admin_role="ops")
    assert enter(make(rules=rules), sign(claims(groups=["ops"], roles=["admin"]))).is_admin
    assert not enter(make(rules=rules), sign(claims(groups=["admin"], roles=["ops"]))).is_admin


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": ...},
        {"iat": ...},
        {"aud": ...},
        {"iss": ...},
        {"sub": ...},
        {"aud": "other"},
        {"aud": ["other"]},
        {"aud": []},
        {"aud": [["agentpool"]]},
        {"iss": "https://id.example.evil"},
        {"iss": ["https://id.example"]},
        {"sub": ""},
        {"sub": "a/b"},
        {"sub": ".."},
        {"sub": "a" * 129},
        {"sub": "a\nb"},
        {"sub": 7},
        {"sub": None},
        {"exp": NOW - 31, "iat": NOW - 100},
        {"exp": NOW - 30, "iat": NOW - 100},
        {"iat": NOW + 31},
        {"nbf": NOW + 31},
        {"exp": NOW + 3601},
        {"exp": 10**30},
        {"exp": "9999999999"},
        {"exp": True},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"iat": float("-inf")},
        {"iat": "now"},
        {"nbf": "now"},
        {"nbf": None},
    ],
)
def test_a_token_that_says_something_wrong_is_refused(changes: Claims) -> None:
    """Every claim that is missing, of another type, for others, or of another time."""
    assert is_refused(make(), sign_by_hand({"alg": "HS256"}, claims(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aud": ["other", "agentpool"]},
        {"exp": NOW - 29, "iat": NOW - 100},
        {"iat": NOW + 30, "exp": NOW + 60},
        {"nbf": NOW + 30},
        {"exp": NOW + 3600},
        {"iat": NOW + 0.5, "exp": NOW + 60.5},
        {"sub": "张三"},
    ],
)
def test_a_token_at_the_edge_is_let_in(changes: Claims) -> None:
    """What is still right, to the second."""
    said = claims(**changes)
    assert enter(make(), sign(said)).owner == said["sub"]


def unsigned(said: Claims) -> bytes:
    return jwt.encode(said, None, algorithm="none").encode()


@pytest.mark.parametrize(
    "token",
    [
        unsigned(claims()),
        unsigned(claims()) + b"AAAA",
        sign(claims(), "t" * 32),
        sign(claims(), "s" * 64, "HS512"),
        sign(claims(), RSA, "RS256"),
        sign(claims(), crit=["x"], x=1),
        sign(claims(), b64=False, crit=["b64"]),
        sign(claims())[:-2],
        sign(claims()) + b".x",
        sign(claims()) + b" ",
        b"",
        b".",
        b"..",
        b"a.b.c",
        "é.é.é".encode(),
        b"\xff.\xfe.\x00",
        b"W10.W10.W10",
        base64url(b"[" * 5000) + b".e30.AA",
        b"a" * 100_000,
        b"e30." * 3,
    ],
)
def test_what_is_no_good_token_is_refused(token: bytes) -> None:
    """Unsigned, by another key or algorithm, cut, malformed, deep, huge."""
    assert is_refused(make(), token)


def test_one_authorization_header_and_no_other_counts() -> None:
    """None, two, another scheme, or another header: refused."""
    door, token = make(), sign(claims())
    right = (b"authorization", b"Bearer " + token)
    for headers in ([], [right, right], [(b"authorization", b"Basic " + token)], [(b"x-api-key", token)]):
        with pytest.raises(Unauthenticated):
            door.authenticate(headers)
    assert door.authenticate([right, (b"x-api-key", b"of a gateway's own")]).owner == "alice"


@given(st.binary(max_size=300))
def test_no_token_breaks_the_door(token: bytes) -> None:
    """Whatever bytes are sent as a token, they are refused and nothing else happens."""
    assert is_refused(make(), token)


@given(
    st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=8)),
    st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "crit", "b64"]), st.none() | st.integers() | st.text(max_size=8)
    ),
)
def test_no_signed_claims_break_the_door(said: Claims, header: Claims) -> None:
    """Whatever JSON a token holds, also a signed one, it is refused unless it says what it must."""
    assert is_refused(make(), sign_by_hand(header, said))


@pytest.mark.parametrize("kid", ["r", "e"])
def test_public_keys_are_found_by_kid(public: Tokens, kid: str) -> None:
    """RS256 and ES256, each with its own key; headers that point elsewhere change nothing."""
    algorithm, key = PUBLIC[kid]
    elsewhere = {"jku": "https://evil.example/jwks", "x5u": "https://evil.example/cert"}
    assert enter(public, sign(claims(), key, algorithm, kid=kid, **elsewhere)).owner == "alice"


def test_the_key_says_the_algorithm(public: Tokens) -> None:
    """Not the token: a public key is no secret for HMAC, and another key's name does not help."""
    pem = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for token in (
        sign_by_hand({"alg": "HS256", "kid": "r"}, claims(), pem),
        sign_by_hand({"alg": "HS256"}, claims(), pem),
        sign_by_hand({"alg": "HS256", "kid": None}, claims(), pem),
        sign(claims(), RSA, "RS256"),
        sign(claims(), RSA, "RS512", kid="r"),
        sign(claims(), RSA, "PS256", kid="r"),
        sign(claims(), RSA, "RS256", kid="e"),
        sign(claims(), OTHER_EC, "ES256", kid="e"),
        sign(claims(), OTHER_EC, "ES256", kid="e", jwk=jwk("e", OTHER_EC)),
        sign(claims(), RSA, "RS256", kid="../../etc/passwd"),
        unsigned(claims()),
    ):
        assert is_refused(public, token), token


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JWK set"),
        (b'{"keys": {}}', "not a JWK set"),
        (jwks(), "has no key"),
        (jwks({"kty": "oct", "k": "c2VjcmV0", "kid": "s"}), "has no key"),
        (jwks({"kty": [], "kid": "s"}), "has no key"),
        (jwks({**jwk("r", RSA), "kid": 7}), "has no key"),
        (jwks(jwk("r", RSA, use="enc")), "has no key"),
        (jwks(jwk("r", RSA, alg="RS512")), "has no key"),
        (jwks(jwk("r", SMALL_RSA)), "less than 2048 bits"),
        (jwks(jwk("r", RSA), jwk("r", EC)), "the same kid"),
        (jwks(jwk("r", RSA, d="AQAB")), "a private key"),
        (jwks({"kty": "RSA", "kid": "r", "n": "!", "e": "AQAB"}), "cannot be read"),
        (jwks({"kty": "RSA", "kid": "r"}), "cannot be read"),
        (jwks({"kty": "EC", "crv": "P-256", "kid": "e", "x": "AA", "y": "AA"}), "cannot be read"),
    ],
)
def test_a_set_without_good_keys_is_refused(raw: bytes, reason: str) -> None:
    """It says what is wrong, and repeats nothing of a key."""
    with pytest.raises(ValueError, match=reason):
        parse_jwks(raw)


def test_other_keys_of_a_set_are_left_out() -> None:
    """A provider may have keys for other uses in it."""
    shared: Claims = {"kty": "oct", "k": "c2VjcmV0", "kid": "s"}
    found = parse_jwks(jwks(shared, jwk("e", EC), jwk("x", RSA, use="enc")))
    assert {kid: key.algorithm for kid, key in found.items()} == {"e": "ES256"}


def test_a_key_that_is_taken_out_of_the_set_counts_no_more(tmp_path: Path) -> None:
    """Within a second, also for tokens that have been let in before."""
    path, clock = tmp_path / "jwks.json", FakeClock()
    path.write_bytes(jwks(jwk("e", EC), jwk("f", OTHER_EC)))
    door = Tokens(followed_keys(str(path), clock), RULES, clock)
    gone, staying = sign(claims(), EC, "ES256", kid="e"), sign(claims(), OTHER_EC, "ES256", kid="f")
    assert not is_refused(door, gone)
    path.write_bytes(jwks(jwk("f", OTHER_EC)))
    clock.advance(1.0)
    assert is_refused(door, gone)
    assert not is_refused(door, staying)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    seen: list[bytes] = []
    decode: Callable[..., Any] = jwt.decode

    def count(token: bytes, *args: Any, **options: Any) -> Any:
        seen.append(token)
        return decode(token, *args, **options)

    monkeypatch.setattr(tokens.jwt, "decode", count)
    return seen


def test_a_verified_token_is_remembered_until_it_expires(verified: list[bytes]) -> None:
    """Its signature is checked once; afterwards it is refused when its time is over."""
    clock = FakeClock()
    door, token = make(clock), sign(claims(exp=NOW + 10))
    for _ in range(3):
        assert enter(door, token).owner == "alice"
    assert len(verified) == 1
    clock.advance(10 + tokens.LEEWAY_S)
    assert is_refused(door, token)


def test_refused_tokens_are_not_remembered(verified: list[bytes]) -> None:
    """Nobody fills the memory without a key; and a token whose time comes is let in then."""
    clock = FakeClock()
    door, token = make(clock), sign(claims(nbf=NOW + 100))
    assert is_refused(door, token)
    clock.advance(100)
    assert enter(door, token).owner == "alice"
    assert len(verified) == 2


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch, verified: list[bytes]) -> None:
    """With more tokens than places the least recently used is checked again."""
    monkeypatch.setattr(tokens, "REMEMBERED", 2)
    door = make()
    three = [sign(claims(jti=str(number))) for number in range(3)]
    for token in (*three, three[2], three[0]):
        enter(door, token)
    assert verified == [*three, three[0]]


def test_a_key_is_not_shown() -> None:
    """Not even where a log shows what was at hand when something broke."""
    assert SECRET not in repr(secret_key(SECRET)())


def test_a_public_key_is_no_secret() -> None:
    """Set as one, it is refused at the start: everybody has it."""
    pem = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(ValueError, match=r"^JWT_SECRET: is a key of another kind"):
        secret_key(pem.decode())
