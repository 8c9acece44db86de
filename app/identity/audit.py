"""Where it is kept what admins did: a file of JSON lines, or the log."""

import json
import logging
import os
from dataclasses import asdict

from app.domain.audit import AUDIT_LOGGER, AuditRecord
from app.domain.errors import StoreUnavailable
from app.identity.key_file import from_ms
from app.ports import Clock

FILE_MODE = 0o600

_log = logging.getLogger(__name__)


class AuditFile:
    """A file that gets one line for each record, in one write, behind what others append to it.

    If it is moved away (by logrotate, say) a new one is begun. A line that could not be written is
    logged as an error, and owed: until it can be written, changes are refused.

    Raises:
        ValueError: it cannot be opened.
    """

    def __init__(self, path: str, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._descriptor = -1
        self._owed = b""
        try:
            self._follow()
        except OSError as error:
            raise ValueError(f"AUDIT_FILE: {path} cannot be written: {error.strerror or error}") from None

    def require(self) -> None:
        try:
            self._append(b"")
        except OSError as error:
            _log.error("AUDIT_FILE: %s cannot be written, so nothing is changed: %s", self._path, error)
            raise StoreUnavailable("The audit log cannot be written.") from error

    def write(self, record: AuditRecord) -> None:
        line = line_of(record, self._clock)
        try:
            self._append(line.encode() + b"\n")
        except OSError as error:
            _log.error("AUDIT_FILE: %s cannot be written (%s); not in it: %s", self._path, error, line)

    def close(self) -> None:
        """Close the file; what comes then opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _append(self, lines: bytes) -> None:
        self._owed += lines
        self._follow()
        if not self._owed:
            return
        written = os.write(self._descriptor, self._owed)
        if written < len(self._owed):
            self._owed = b"\n" + self._owed  # behind the torn line, whole
            raise OSError("only a part could be written")
        self._owed = b""

    def _follow(self) -> None:
        """Open the file that has the name now, unless it is open."""
        try:
            found = os.stat(self._path)
            if self._descriptor >= 0 and os.path.samestat(found, os.fstat(self._descriptor)):
                return
        except FileNotFoundError:
            pass
        self.close()
        self._descriptor = os.open(
            self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, FILE_MODE
        )


class AuditLogger:
    """The logger ``agentpool.audit``, which takes records whatever the level of the others is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._logger = logging.getLogger(AUDIT_LOGGER)
        self._logger.setLevel(logging.INFO)

    def require(self) -> None:
        pass

    def write(self, record: AuditRecord) -> None:
        self._logger.info("%s", line_of(record, self._clock))


def open_audit(path: str | None, clock: Clock) -> AuditFile | AuditLogger:
    """Return the log in the file ``path``, or without one that in the logger.

    Raises:
        ValueError: the file cannot be opened; names the setting.
    """
    return AuditFile(path, clock) if path else AuditLogger(clock)


def line_of(record: AuditRecord, clock: Clock) -> str:
    """Return the record as one line of JSON, with the time."""
    at = from_ms(clock.now_ms()).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"at": at, **asdict(record)}, separators=(",", ":"))
