"""Keeping secrets out of what is logged: those that are known, and what looks like one.

It is applied when everything has been put into a line: message, arguments, fields, tracebacks, whoever
logs; in JSON to each text, so that a line stays JSON. The audit log's lines are cleaned of known secrets
only: users choose their names, and one that looks like a key must not hide who was erased. What nobody
knows and what looks like nothing cannot be found; so tracebacks show no variables (``logs``), and no part
of the program logs what people or providers say.
"""

import html
import json
import logging
import os
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote

from app.domain.audit import AUDIT_LOGGER

REDACTED = "[redacted]"
MAX_CHARS = 64 * 1024
"""What is longer is cut, so that a line costs some milliseconds at the most."""
MIN_CHARS = 6
"""A known secret that is shorter would be found in the middle of words."""

_LOOKED_AT = 4096  # characters beyond the cut, lest one cuts a secret in two and shows the half
_NAMES = (
    r"authorization|cookie|pass(?:word|wd|phrase)|api[-_]?key|secret(?:[-_]?(?:access[-_]?)?key)?|private[-_]?key"
    r"|credentials|(?:access|refresh|id|auth|bearer|session)[-_]?token"
)
_VALUE = r"[^\s\"'\\,;&)}\]]{4,}"
# Who logs in, in a URL: if it is user:password up to the last "@", since people write "/" and "?" in
# passwords as they are; else within what may be a host's name. Never beyond the next "://", for speed.
_LOGIN = (
    r"(?P<kept>://)(?:[^\s/?#\"'<>@:\[]*:(?![0-9]+(?:[/?#]|$))(?:(?!://)[^\s\"'<>])*|[^\s/?#\"'<>]*)(?=@)"
)
# What a text must have in it, in small letters, to be looked at; and what of it is replaced: all but "kept".
_PATTERNS = [
    (words, re.compile(pattern, re.IGNORECASE))
    for words, pattern in (
        # A credential by its form: OpenAI's and others' keys, GitHub's, Amazon's, Google's, this product's,
        # JSON web tokens.
        (("sk-", "sk_", "rk-", "rk_"), r"\b(?:sk|rk)[-_][A-Za-z0-9_-]{8,}"),
        (("gh",), r"\b(?:gh[opsur]|github_pat)_[A-Za-z0-9_]{20,}"),
        (("akia", "asia"), r"\bA[KS]IA[A-Z0-9]{16}\b"),
        (("aiza",), r"\bAIza[A-Za-z0-9_-]{30,}"),
        (("ap_",), r"\bap_[0-9a-f]{6,}_[A-Za-z0-9_-]{8,}"),
        # (Read up to the next that may begin: no part twice, however many there are.)
        (("eyj",), r"\beyJ(?:[A-Za-z0-9_]|-(?!eyJ)){6,}+\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"),
        (("private key-----",), r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END|\Z)"),
        # By what stands before it: a scheme, a header's or a field's name (in JSON in JSON, too), "//".
        (("bearer ", "basic "), r"(?P<kept>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{6,}"),
        (
            ("authorization", "cookie", "pass", "key", "secret", "credential", "token"),
            rf"(?P<kept>(?:{_NAMES})\\*[\"']?\s*(?:[:=,]|\bis\b)\s*(?:b(?=\\*[\"']))?\\*[\"']?"
            r"(?:(?:bearer|basic|token|digest)\s++)?+)(?!\[redacted)" + _VALUE,
        ),
        (("token=", "signature=", "key="), rf"(?P<kept>(?:token|signature|[?&]key)=)(?!\[redacted){_VALUE}"),
        (("://",), _LOGIN),
    )
]
_URL_SAFE = str.maketrans("+/", "-_")
_VARIABLE = re.compile(r"(?:^|_)(?:key|token|secret|password|passwd|credentials?)s?$", re.IGNORECASE)
_RESERVED = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class Redactor:
    """Replaces ``secrets``, in the forms in which they get into a text, and whatever looks like a secret."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = {form for secret in secrets if len(secret) >= MIN_CHARS for form in _forms(secret)}
        self._known = sorted(known, key=len, reverse=True)  # one may be the beginning of another
        self._patterns = _PATTERNS

    def of_logger(self, name: str) -> "Redactor":
        """Return what cleans the lines of that logger: of known secrets only, if it is the audit log's."""
        if name != AUDIT_LOGGER:
            return self
        known_only = copy(self)
        known_only._patterns = []
        return known_only

    def clean(self, text: str) -> str:
        """Return ``text`` without secrets, at most ``MAX_CHARS`` of it."""
        surplus = len(text) - MAX_CHARS
        if surplus > 0:
            text = text[: MAX_CHARS + _LOOKED_AT]
        for secret in self._known:
            text = text.replace(secret, REDACTED)
        small = text.lower()
        for words, pattern in self._patterns:
            if any(word in small for word in words):
                text = pattern.sub(_replacement, text)
        return text if surplus <= 0 else f"{text[:MAX_CHARS]}… [cut, it was {surplus} characters longer]"

    def clean_value(self, value: Any) -> Any:
        """Return what a field of a record holds without secrets; what is no plain value becomes text."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self.clean(str(key)): self.clean_field(str(key), item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean_value(item) for item in value]
        return self.clean(str(value))

    def clean_field(self, name: str, value: Any) -> Any:
        """Return the value of a field without secrets; its name may say that it is one."""
        if isinstance(value, str | bytes):
            text = value.decode(errors="replace") if isinstance(value, bytes) else value
            prefix = f"{name}: "
            cleaned = self.clean(prefix + text)
            return cleaned.removeprefix(prefix) if cleaned.startswith(prefix) else REDACTED
        return self.clean_value(value)


class RedactionFilter(logging.Filter):
    """Cleans records, for programs that embed the product and keep their own logging.

    It belongs on a handler: a logger's filters do not see what its children log.

    handler.addFilter(RedactionFilter(settings.secrets()))
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._redactor = Redactor(secrets)
        self._formatter = logging.Formatter()

    def filter(self, record: logging.LogRecord) -> bool:
        redactor = self._redactor.of_logger(record.name)
        clean = redactor.clean
        record.msg, record.args = clean(_message_of(record)), None
        if record.exc_info:
            record.exc_text = self._formatter.formatException(record.exc_info)
            record.exc_info = None
        if record.exc_text:
            record.exc_text = clean(record.exc_text)
        if record.stack_info:
            record.stack_info = clean(record.stack_info)
        for name in record.__dict__.keys() - _RESERVED:
            record.__dict__[name] = redactor.clean_field(name, record.__dict__[name])
        return True


def secrets_in_url(url: str | None) -> list[str]:
    """Return the passwords and keys in a URL: of its user, and in its query."""
    if not url:
        return []
    authority = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0]
    login, separator, _ = authority.rpartition("@")
    password = login.partition(":")[2] if separator else ""
    found = [password]
    if separator and not password:  # a token in the place of a user
        found = [login]
    if match := re.search(_LOGIN, url):  # with "/", "?" or "#" in it as they are
        found.append(match[0].partition("://")[2].partition(":")[2])
    found += [unquote(secret) for secret in found]
    query = parse_qsl(url.partition("?")[2])
    found += [value for name, value in query if re.search(_NAMES, name, re.IGNORECASE)]
    return [secret for secret in found if secret]


def secrets_in_environment(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return what variables hold whose names say that it is a secret: what tools and providers read, too."""
    return [value.strip() for name, value in environment.items() if _VARIABLE.search(name) and value.strip()]


def _forms(secret: str) -> set[str]:
    """Return how a secret looks in a text: as it is, in JSON, Python, HTML, a URL, hexadecimal, base64."""
    data = secret.encode(errors="replace")
    escaped = json.dumps(secret)[1:-1]
    readable = json.dumps(secret, ensure_ascii=False)[1:-1]
    in_url = {quote(secret, errors="replace"), quote(data, safe=""), quote_plus(data)}
    return {
        secret, escaped, readable, json.dumps(escaped)[1:-1], repr(secret)[1:-1], repr(data)[2:-1],
        html.escape(secret), html.escape(secret, quote=False), data.hex(), data.hex().upper(),
        *in_url, *(re.sub("%..", lambda escape: escape[0].lower(), text) for text in in_url),
        *_in_base64(data), *(text.translate(_URL_SAFE) for text in _in_base64(data)),
    }  # fmt: skip


def _in_base64(data: bytes) -> set[str]:
    """Return the characters that ``data`` alone decides, alone and behind other bytes: "user:", say."""
    # Six bits make a character: with 0, 1 or 2 bytes before it, the first 0, 2 or 3 hold some of theirs.
    behind = {b64encode(bytes(n) + data).decode()[(0, 2, 3)[n] : (n + len(data)) * 8 // 6] for n in range(3)}
    return behind | {b64encode(data).decode().rstrip("=")}


def _replacement(match: re.Match[str]) -> str:
    return match.groupdict().get("kept", "") + REDACTED


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit: what they are is nobody's business
        return str(record.msg)
