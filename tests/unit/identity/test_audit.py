"""The audit log: whole lines in one file, and nothing done that it could not keep."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from app.domain.audit import AuditRecord
from app.domain.errors import StoreUnavailable
from app.identity.audit import AuditFile
from tests.fakes import FakeClock

RECORD = AuditRecord(credential="key:1", user_id="root", action="DELETE /x", owner="张三", status=200)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audit(path: Path) -> AuditFile:
    return AuditFile(str(path), FakeClock())


def full_disk(monkeypatch: pytest.MonkeyPatch, *, takes: int | None = None) -> None:
    """Have the next writes fail, or take only so many bytes."""
    write = os.write

    def fail(descriptor: int, data: bytes) -> int:
        if takes is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:takes])

    monkeypatch.setattr(os, "write", fail)


def test_a_record_is_one_line(audit: AuditFile, path: Path) -> None:
    """With the time, in ASCII, behind what is there; the file is its owner's alone."""
    audit.write(RECORD)
    audit.write(RECORD)
    first, second = path.read_bytes().decode("ascii").splitlines()
    assert first == second
    told = json.loads(first)
    assert (told["at"], told["owner"], told["code"]) == ("2027-01-15T08:00:00.000Z", "张三", None)
    assert path.stat().st_mode & 0o777 == 0o600
    AuditFile(str(path), FakeClock()).write(RECORD)
    assert len(path.read_text().splitlines()) == 3


def test_each_line_is_one_write(audit: AuditFile, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the lines of several processes never mix."""
    written: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda _, data: written.append(data) or len(data))
    audit.write(RECORD)
    assert len(written) == 1
    assert written[0].count(b"\n") == 1
    assert written[0].endswith(b"\n")


def test_a_file_that_is_moved_away_is_begun_anew(audit: AuditFile, path: Path) -> None:
    """As logrotate does it, without a signal."""
    audit.write(RECORD)
    path.rename(path.with_suffix(".1"))
    audit.require()
    audit.write(RECORD)
    assert len(path.read_text().splitlines()) == len(path.with_suffix(".1").read_text().splitlines()) == 1


def test_a_line_that_cannot_be_written_is_owed(
    audit: AuditFile, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged as an error, whole; no further change is allowed until it is written, and it is then."""
    with monkeypatch.context() as patched:
        full_disk(patched)
        audit.require()
        audit.write(RECORD)
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(said) == 1
        assert '"action":"DELETE /x"' in said[0]
        with pytest.raises(StoreUnavailable, match="audit log"):
            audit.require()
    assert path.read_text() == ""
    audit.require()
    assert len(path.read_text().splitlines()) == 1


def test_a_torn_line_is_written_again_whole(
    audit: AuditFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk takes a part of it only: what is torn stands alone, and every other line is whole."""
    with monkeypatch.context() as patched:
        full_disk(patched, takes=7)
        audit.write(RECORD)
    audit.write(RECORD)
    torn, *whole = path.read_text().splitlines()
    assert len(torn) == 7
    assert [json.loads(line)["action"] for line in whole] == ["DELETE /x"] * 2


def test_a_file_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    """The setting is named."""
    with pytest.raises(ValueError, match=r"^AUDIT_FILE: .*/none/audit cannot be written: No such file"):
        AuditFile(str(tmp_path / "none" / "audit"), FakeClock())
