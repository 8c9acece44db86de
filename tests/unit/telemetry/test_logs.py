"""Lines of the log, as they are written."""

import io
import json
import logging
from typing import Any

import pytest

from app.telemetry.logs import LogFormat, make_handler
from app.telemetry.redaction import MAX_CHARS, REDACTED, Redactor

SECRET = 'one "two" three'


def write(log_format: LogFormat, message: str, name: str = "some", error: BaseException | None = None) -> str:
    stream = io.StringIO()
    handler = make_handler(log_format, Redactor([SECRET]))
    handler.setStream(stream)
    trace = (type(error), error, error.__traceback__) if error else None
    handler.handle(logging.LogRecord(name, logging.ERROR, __file__, 1, "%s", (message,), trace))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("message", "rest"),
    [
        ("-----BEGIN PRIVATE KEY-----\nabc", REDACTED),
        (f"a {SECRET} \x1b", f"a {REDACTED} \x1b"),
        ("password=abcd\\", f"password={REDACTED}\\"),
        ('cookie: "abcdef', f'cookie: "{REDACTED}'),
        ('{"authorization": "Bearer abcdef"}', f'{{"authorization": "Bearer {REDACTED}"}}'),
        ("x" * (MAX_CHARS + 7), "x" * (MAX_CHARS - 7) + "… [cut, it was 14 characters longer]"),
    ],
)
def test_a_cleaned_line_is_json(message: str, rest: str) -> None:
    """Whatever is replaced or cut in it, the fields around it stay."""
    line: dict[str, Any] = json.loads(write("json", message))
    assert line["event"] == rest
    assert (line["logger"], line["level"]) == ("some", "error")


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_tracebacks_are_cleaned(log_format: LogFormat) -> None:
    """What an error says, and what the one behind it says."""
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(f"no {SECRET}") from error
    except ValueError as error:
        line = write(log_format, "broke", error=error)
    assert line.count(REDACTED) == 2
    assert "two" not in line


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_the_audit_log_names_whom_it_means(log_format: LogFormat) -> None:
    """A name that looks like a key, which users may choose, stays; a known secret does not."""
    line = write(log_format, f"sk-alice-2024-x -----BEGIN PRIVATE KEY----- {SECRET}", "agentpool.audit")
    assert "sk-alice-2024-x -----BEGIN PRIVATE KEY-----" in line
    assert "two" not in line
    assert "sk-alice" not in write(log_format, "sk-alice-2024-x")
