"""A disk for SQLite that can refuse a sync, and that remembers what a power cut would leave."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import apsw

_names = itertools.count()


class _Step(NamedTuple):
    kind: str  # "write", "truncate", "sync", "delete"
    offset: int = 0
    data: bytes = b""


class FaultyDisk(apsw.VFS):
    """Passes everything on to the real file system and keeps the steps of every file in order."""

    def __init__(self, usual: str) -> None:
        self.usual = usual
        self.name = f"faulty-{next(_names)}"
        self.refuses_sync = False
        self.steps: list[tuple[str, _Step]] = []
        super().__init__(self.name, base=usual)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _File(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        self.note(filename, _Step("delete"))
        if syncdir:
            self.note(filename, _Step("sync"))

    def note(self, path: str, step: _Step) -> None:
        self.steps.append((Path(path).name, step))

    def image(self, cut: int, random: Random, folder: Path) -> None:
        """Write into ``folder`` what the disk may hold after a power cut at step ``cut``.

        Synced writes are there; of the others each is there or not, at random.
        """
        last_sync: dict[str, int] = defaultdict(lambda: -1)
        for position, (name, step) in enumerate(self.steps[:cut]):
            if step.kind == "sync":
                last_sync[name] = position
        files: dict[str, bytearray] = {}
        for position, (name, step) in enumerate(self.steps[:cut]):
            if position < last_sync[name] or random.random() < 0.5:
                _apply(files, name, step)
        for name, content in files.items():
            (folder / name).write_bytes(content)


def _apply(files: dict[str, bytearray], name: str, step: _Step) -> None:
    if step.kind == "write":
        content = files.setdefault(name, bytearray())
        end = step.offset + len(step.data)
        content.extend(bytes(max(0, end - len(content))))
        content[step.offset : end] = step.data
    elif step.kind == "truncate":
        del files.setdefault(name, bytearray())[step.offset :]
    elif step.kind == "delete":
        files.pop(name, None)


class _File(apsw.VFSFile):
    def __init__(self, disk: FaultyDisk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        self._path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        super().__init__(disk.usual, name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._disk.note(self._path, _Step("write", offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        super().xTruncate(newsize)
        self._disk.note(self._path, _Step("truncate", newsize))

    def xSync(self, flags: int) -> None:
        if self._disk.refuses_sync:
            raise apsw.exception_for(apsw.SQLITE_IOERR_FSYNC)
        super().xSync(flags)
        self._disk.note(self._path, _Step("sync"))


@contextmanager
def faulty_disk() -> Iterator[FaultyDisk]:
    """Make a ``FaultyDisk`` the disk of every connection that is opened inside."""
    usual = apsw.vfs_names()[0]
    disk = FaultyDisk(usual)
    apsw.set_default_vfs(disk.name)
    try:
        yield disk
    finally:
        apsw.set_default_vfs(usual)
        disk.unregister()
