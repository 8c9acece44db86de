"""Keeping secrets out of what is logged: those that are known, and what looks like one.

It is applied to whole lines, after everything has been put into them: message, arguments, fields,
tracebacks, whoever logs. What nobody knows and what looks like nothing cannot be found; so tracebacks
show no variables (``logs``), and no part of the program logs what people or providers say.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

REDACTED = "[redacted]"
MAX_CHARS = 64 * 1024
"""What is longer is cut, so that a line costs some milliseconds at the most."""
MIN_CHARS = 6
"""A known secret that is shorter would be found in the middle of words."""

_LOOKED_AT = 4096  # characters beyond the cut, lest one cuts a secret in two and shows the half
_NAMES = (
    r"authorization|cookie|pass(?:word|wd|phrase)|api[-_]?key|secret(?:[-_]?key)?|private[-_]?key"
    r"|credentials|(?:access|refresh|id|auth|bearer|session)[-_]?token"
)
# What a text must have in it, in small letters, to be looked at; and what of it is replaced: all but "kept".
_PATTERNS = [
    (words, re.compile(pattern, re.IGNORECASE))
    for words, pattern in (
        # A credential by its form: OpenAI's and others' keys, this product's, JSON web tokens.
        (("sk-", "sk_", "rk-", "rk_"), r"\b(?:sk|rk)[-_][A-Za-z0-9_-]{8,}"),
        (("ap_",), r"\bap_[0-9a-f]{6,}_[A-Za-z0-9_-]{8,}"),
        # (Read up to the next that may begin: no part twice, however many there are.)
        (("eyj",), r"\beyJ(?:[A-Za-z0-9_]|-(?!eyJ)){6,}+\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"),
        (("private key-----",), r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END|\Z)"),
        # By what stands before it: a scheme, a header's or a field's name (in JSON in JSON, too), "//".
        (("bearer ", "basic "), r"(?P<kept>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{6,}"),
        (
            ("authorization", "cookie", "pass", "key", "secret", "credential", "token"),
            rf"(?P<kept>(?:{_NAMES})\\*[\"']?\s*(?:[:=,]|\bis\b)\s*(?:b(?=\\*[\"']))?\\*[\"']?"
            r"(?:(?:bearer|basic|token|digest)\s++)?+)(?!\[redacted)[^\s\"'\\,;&)}\]]{4,}",
        ),
        (("://",), r"(?P<kept>://)[^\s/?#\"'<>]*(?=@)"),
    )
]
_VARIABLE = re.compile(r"(?:^|_)(?:key|token|secret|password|passwd|credentials?)s?$", re.IGNORECASE)
_RESERVED = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class Redactor:
    """Replaces ``secrets``, in the forms in which they get into a text, and whatever looks like a secret."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = {form for secret in secrets if len(secret) >= MIN_CHARS for form in _forms(secret)}
        # The longest first: one may be the beginning of another.
        texts = [re.escape(text) for text in sorted(known, key=len, reverse=True)]
        self._known = re.compile("|".join(texts)) if texts else None

    def clean(self, text: str) -> str:
        """Return ``text`` without secrets, at most ``MAX_CHARS`` of it."""
        surplus = len(text) - MAX_CHARS
        if surplus > 0:
            text = text[: MAX_CHARS + _LOOKED_AT]
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        small = text.lower()
        for words, pattern in _PATTERNS:
            if any(word in small for word in words):
                text = pattern.sub(_replacement, text)
        return text if surplus <= 0 else f"{text[:MAX_CHARS]}… [cut, it was {surplus} characters longer]"

    def clean_value(self, value: Any) -> Any:
        """Return what a field of a record holds without secrets; what is no plain value becomes text."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {str(key): self.clean_field(str(key), item) for key, item in value.items()}
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
        clean = self._redactor.clean
        record.msg, record.args = clean(_message_of(record)), None
        if record.exc_info:
            record.exc_text = self._formatter.formatException(record.exc_info)
            record.exc_info = None
        if record.exc_text:
            record.exc_text = clean(record.exc_text)
        if record.stack_info:
            record.stack_info = clean(record.stack_info)
        for name in record.__dict__.keys() - _RESERVED:
            record.__dict__[name] = self._redactor.clean_field(name, record.__dict__[name])
        return True


def secrets_in_url(url: str | None) -> list[str]:
    """Return the passwords and keys in a URL: of its user, and in its query."""
    if not url:
        return []
    authority = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0]
    login, separator, _ = authority.rpartition("@")
    password = login.partition(":")[2] if separator else ""
    found = [password, unquote(password)]
    if separator and not password:  # a token in the place of a user
        found = [login]
    query = parse_qsl(url.partition("?")[2])
    found += [value for name, value in query if re.search(_NAMES, name, re.IGNORECASE)]
    return [secret for secret in found if secret]


def secrets_in_environment(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return what variables hold whose names say that it is a secret: what tools and providers read, too."""
    return [value.strip() for name, value in environment.items() if _VARIABLE.search(name) and value.strip()]


def _forms(secret: str) -> set[str]:
    """Return how a secret looks in a text: as it is, in JSON, in a Python literal, in a URL."""
    escaped = json.dumps(secret)[1:-1]
    readable = json.dumps(secret, ensure_ascii=False)[1:-1]
    written = {secret, escaped, readable, json.dumps(escaped)[1:-1], repr(secret)[1:-1]}
    return written | {quote(secret, safe="", errors="replace")}


def _replacement(match: re.Match[str]) -> str:
    return match.groupdict().get("kept", "") + REDACTED


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit: what they are is nobody's business
        return str(record.msg)
