"""Secrets in what is logged: known ones in every form, others by their look, in any part of a record."""

import base64
import html
import json
import logging
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import Settings
from app.telemetry.redaction import (
    MAX_CHARS,
    MIN_CHARS,
    REDACTED,
    RedactionFilter,
    Redactor,
    secrets_in_environment,
    secrets_in_url,
)

SECRET = 'Tr0ub4dor&3 "quoted" ünd\\more'
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        json.dumps({"a": SECRET}),
        json.dumps(json.dumps({"a": SECRET})),
        repr({"a": SECRET}),
        "https://x/?q=Tr0ub4dor%263%20%22quoted%22%20%C3%BCnd%5Cmore",
        "https://x/?q=Tr0ub4dor%263+%22quoted%22+%C3%BCnd%5Cmore",
        "https://x/?q=Tr0ub4dor%263%20%22quoted%22%20%c3%bcnd%5cmore",
        f"<p>{html.escape(SECRET)}</p>",
        repr(SECRET.encode()),
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
        f"it was{SECRET}!",
    ],
)
def test_a_known_secret_is_found_in_every_form(text: str) -> None:
    """As it is, in JSON, in JSON in JSON, in Python, in URLs, in HTML, in hexadecimal, within a word."""
    cleaned = Redactor([SECRET]).clean(text)
    assert REDACTED in cleaned
    for part in ("quoted", "Tr0ub4dor", "5472", "6d6f", "6D6F"):
        assert part not in cleaned


def test_a_slash_in_a_secret_may_stand_in_a_url_as_it_is() -> None:
    """Libraries differ in what they escape."""
    assert Redactor(["one/two&three"]).clean("/one/two%26three/x") == f"/{REDACTED}/x"


@given(secret=st.binary(min_size=3, max_size=20).map(bytes.hex), before=st.binary(), behind=st.binary())
def test_no_known_secret_is_left_in_base64(secret: str, before: bytes, behind: bytes) -> None:
    """Of either alphabet, alone or among other bytes: all but bits of it that share their characters."""
    redactor = Redactor([secret])
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        cleaned = redactor.clean(encode(before + secret.encode() + behind).decode())
        assert REDACTED in cleaned
        whole = (len(before) + 2) // 3 * 4, (len(before) + len(secret)) // 3 * 4
        text = encode(before + secret.encode() + behind).decode()[slice(*whole)]
        assert not text or text not in cleaned


@given(
    secret=st.text(min_size=MIN_CHARS, max_size=40).filter(
        lambda text: text.strip() and text not in REDACTED
    ),
    before=st.text(max_size=9),
    behind=st.text(max_size=9),
)
def test_no_known_secret_is_left_in_any_text(secret: str, before: str, behind: str) -> None:
    """Whatever it is made of and stands among: raw, as JSON of either kind, as a Python literal."""
    redactor, around = Redactor([secret]), before + secret + behind
    for text, form in (
        (around, secret),
        (json.dumps({"k": around}), json.dumps(secret)[1:-1]),
        (json.dumps([around], ensure_ascii=False), json.dumps(secret, ensure_ascii=False)[1:-1]),
        (repr({"k": secret}), repr(secret)[1:-1]),
    ):
        assert form not in redactor.clean(text).replace(REDACTED, "\n")


def test_of_two_secrets_the_longer_one_goes_first() -> None:
    """One that begins as another leaves no rest; one that is too short to be told from words stays."""
    assert Redactor(["canary", "canary-and-more", "abc"]).clean("canary-and-more canary abc") == (
        f"{REDACTED} {REDACTED} abc"
    )


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (
            "Incorrect API key provided: sk-proj-abcDEF123_-x. You",
            "Incorrect API key provided: [redacted]. You",
        ),
        ("key ap_0123456789abcdef_abcdefghijklmnop is", "key [redacted] is"),
        (f"token {JWT} was", "token [redacted] was"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer [redacted]"),
        ("authorization: Basic dXNlcjpwYXNz, x: y", "authorization: Basic [redacted], x: y"),
        ("[(b'authorization', b'Token abcdef')]", "[(b'authorization', b'Token [redacted]')]"),
        ('{"x-api-key": "abcdef", "n": 1}', '{"x-api-key": "[redacted]", "n": 1}'),
        (r"{\"apiKey\": \"abcdef\"}", r"{\"apiKey\": \"[redacted]\"}"),
        ("OPENAI_API_KEY=abcdef GO=1", "OPENAI_API_KEY=[redacted] GO=1"),
        ("password=hunter2&user=x", "password=[redacted]&user=x"),
        ("at postgresql://user:p%40ss@db:5432/x?a=b", "at postgresql://[redacted]@db:5432/x?a=b"),
        ("at https://ghp_token@host/x", "at https://[redacted]@host/x"),
        ("at postgresql://u:p@ss/w0rd?x@db/x", "at postgresql://[redacted]@db/x"),
        ("redis://:a/b@h:1,redis://:c#d@h:2", "redis://[redacted]@h:1,redis://[redacted]@h:2"),
        ("POST https://h/v1?key=abcdef&n=1 200", "POST https://h/v1?key=[redacted]&n=1 200"),
        ("https://h/x?a=1&token=abcdef#y", "https://h/x?a=1&token=[redacted]"),
        ("https://h/x?X-Amz-Signature=abcdef", "https://h/x?X-Amz-Signature=[redacted]"),
        ("aws_secret_access_key = abc/def", "aws_secret_access_key = [redacted]"),
        ("as AKIAIOSFODNN7EXAMPLE.", "as [redacted]."),
        ("with ghp_16C7e42F292c6912E7710c838347Ae178B4a.", "with [redacted]."),
        ("with AIzaSyA1234567890abcdefghijklmnopqrs.", "with [redacted]."),
        ("bearer abcdefgh", "bearer [redacted]"),
        ("x -----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END", "x [redacted]"),
        ("access_token='abcdef'", "access_token='[redacted]'"),
    ],
)
def test_what_looks_like_a_secret_is_replaced(text: str, rest: str) -> None:
    """By its form, or by what stands before it; what stands around it stays."""
    assert Redactor().clean(text) == rest


@pytest.mark.parametrize(
    "text",
    [
        '{"credential":"key:8056ed08db979da8","user_id":"ops"}',  # of the audit log
        '{"credential":"command line","path":"key:8056ed08db979da8 admin"}',
        "session 'user_001' is unreadable and left out of a listing",
        "max_tokens=100, prompt_tokens: 21, key error",
        "GET http://127.0.0.1:8000/sessions/a@b HTTP/1.1 200",
        "GET http://[::1]:8000/sessions/a@b?cursor=abcdef HTTP/1.1 200",
        "the cache says key=user_001, asia_pacific, ghost_of_a_name",
        "the database refused a statement: UniqueViolationError",
        "app.stores.postgres ap_name eyJ sk-1 bearer of news",
        "turn 0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11 broke",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    """Ids, counts, addresses and ordinary words are what logs are read for."""
    assert Redactor().clean(text) == text


def test_a_long_line_is_cut_and_no_secret_with_it() -> None:
    """It says how much was cut; a secret over the edge does not leave its first half."""
    text = "x" * (MAX_CHARS - 5) + SECRET + "y" * 10_000
    cleaned = Redactor([SECRET]).clean(text)
    assert "Tr0u" not in cleaned
    assert len(cleaned) < MAX_CHARS + 100
    assert str(len(text) - MAX_CHARS) in cleaned


HOSTILE = [
    "a-", "a_", "A ", "://", "://u:", "://@", "eyJ", "-eyJ", "-eyJaaaaaa", "eyJa.", "sk-",
    "-sk-a", "ap_0", "-ap_000000_",
    "authorization: ", "password", "password=", "is ", "bearer ", "-----BEGIN ",
    "private key-----", "\\\\", "'", " ", "=", "ghp_", "-aiza", "&key=", "://u:p/",
]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", *HOSTILE])
def test_no_line_takes_long(prefix: str) -> None:
    """Whatever is repeated to the longest line that is looked at: the cost grows as its length."""
    redactor = Redactor([SECRET])
    for unit in HOSTILE:
        text = prefix + unit * (MAX_CHARS // len(unit))
        began = time.process_time()
        redactor.clean(text)
        assert time.process_time() - began < 0.4, unit


class Kept(logging.Handler):
    """Formats as a program's own handler would."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        extra = {
            name: value for name, value in record.__dict__.items() if name in ("headers", "note", "count")
        }
        self.lines.append(f"{self.format(record)} {extra}")


@pytest.fixture
def kept() -> Any:
    handler, logger = Kept(), logging.getLogger("someone.elses")
    handler.addFilter(RedactionFilter([SECRET]))
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_an_embedders_records_are_cleaned(kept: Kept) -> None:
    """Message, arguments, fields, exception, its cause and the stack; what is no text stays as it is."""
    logger = logging.getLogger("someone.elses.child")
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(f"no {SECRET}") from error
    except ValueError:
        logger.exception(
            "broke %s with %r",
            SECRET,
            {"authorization": "Bearer abcdefgh"},
            stack_info=True,
            extra={
                "headers": {"authorization": "abcdefgh", "n": [1, SECRET]},
                "note": (SECRET, b"sk-0123456789"),
                "count": 7,
            },
        )
    (line,) = kept.lines
    assert "Traceback" in line
    assert "Stack" in line
    assert "'count': 7" in line
    for text in ("Tr0ub4dor", "abcdefgh", "0123456789"):
        assert text not in line


def test_an_embedders_audit_lines_keep_their_names(kept: Kept) -> None:
    """One that looks like a key, too, since users choose it; a known secret goes all the same."""
    logger = logging.getLogger("agentpool.audit")
    logger.addHandler(kept)
    try:
        logger.warning("DELETE /users/sk-alice-2024-x %s", SECRET)
    finally:
        logger.removeHandler(kept)
    assert kept.lines == [f"DELETE /users/sk-alice-2024-x {REDACTED} {{}}"]


def test_arguments_that_do_not_fit_are_not_told(kept: Kept) -> None:
    """A line that cannot be made shows its template, without what was meant to be in it."""
    template = "%d %d"
    logging.getLogger("someone.elses").error(template, SECRET)
    assert "%d %d" in kept.lines[0]
    assert "Tr0ub4dor" not in kept.lines[0]


@pytest.mark.parametrize(
    ("url", "secrets"),
    [
        ("postgresql://user:p%40ss@db/x", {"p%40ss", "p@ss"}),
        ("redis+sentinel://:secret@a:1,b:2/service/0", {"secret"}),
        ("https://token@host/v1", {"token"}),
        ("postgresql://u:p@ss/w0%2Frd?x@db/x", {"p", "p@ss/w0%2Frd?x", "p@ss/w0/rd?x"}),
        ("postgresql://db/x?user=u&password=abcdef&sslmode=require", {"abcdef"}),
        ("sqlite:///./a@b.db", set()),
        ("memory://", set()),
        (None, set()),
    ],
)
def test_the_secrets_of_a_url(url: str | None, secrets: set[str]) -> None:
    """A user's password, as it is written and as it is meant, a token, and what the query calls a secret."""
    assert set(secrets_in_url(url)) == secrets


def test_the_secrets_of_the_environment() -> None:
    """What a variable's name says is one."""
    environment = {
        "WEATHER_API_KEY": "a1 ",
        "DB_PASSWORD": "b2",
        "KEYBOARD": "c3",
        "TOKENS": "d4",
        "API_KEYS_FILE": "e5",
    }
    assert secrets_in_environment(environment) == ["a1", "b2", "d4"]


def test_the_secrets_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of every provider, passwords in every URL, each key of the ring."""
    ring = ["QUFB" * 10 + "QUE=", "QkJC" * 10 + "QkI="]
    monkeypatch.setenv("OTHER_KEY", "other-key")
    settings = Settings(
        _env_file=None,
        openai_api_key="openai-key",
        openai_base_url="https://me:base-password@host/v1",
        model_providers={
            "other": {"base_url": "https://o/v1", "api_key_env": "OTHER_KEY", "models": {"m": {}}}
        },
        store_url="postgresql://u:store-password@db/x",
        rate_limit_url="redis://:limit-password@r/0",
        jwt_secret="j" * 32,
        encryption_keys=", ".join(ring),
    )
    secrets = set(settings.secrets())
    assert secrets >= {
        "openai-key", "base-password", "other-key", "store-password", "limit-password", "j" * 32, *ring,
    }  # fmt: skip
