"""Disks for a server's store that can be made full and given room again, while it runs."""

import os
import resource
import subprocess
from pathlib import Path
from typing import Protocol, Self

from tests.serverprocess import ServerProcess

SIZE_MIB = 48
LARGER_MIB = 96


class SmallDisk(Protocol):
    folder: Path

    def fill(self, server: ServerProcess) -> None:
        """Leave no room for what the server would write."""

    def enlarge(self, server: ServerProcess) -> None:
        """Give it room again."""

    def remove(self) -> None: ...


class SmallFileSystem:
    """A file system of its own in memory; to mount it takes root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def mount(cls, folder: Path) -> Self | None:
        """Return the disk, ``None`` if this machine does not let us mount one."""
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(folder)]
        try:
            is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            is_mounted = False
        return cls(folder) if is_mounted else None

    def fill(self, server: ServerProcess) -> None:
        with (self.folder / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                pass  # full to the last block

    def enlarge(self, server: ServerProcess) -> None:
        subprocess.run(["mount", "-o", f"remount,size={LARGER_MIB}m", str(self.folder)], check=True)

    def remove(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class LimitedFiles:
    """An ordinary folder; the server's files may not grow beyond a limit (``RLIMIT_FSIZE``)."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder

    def fill(self, server: ServerProcess) -> None:
        size = os.path.getsize(self.folder / "pool.db-wal")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        # Something has to notice it; a session this large finds no room in what the files have.
        body = {"session_id": "too-large", "metadata": {"x": "y" * 50_000}}
        assert server.request("POST", "/sessions", body).status == 503

    def enlarge(self, server: ServerProcess) -> None:
        limits = resource.RLIM_INFINITY, resource.RLIM_INFINITY
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, limits)

    def remove(self) -> None:
        pass


def small_disk(folder: Path) -> SmallDisk:
    """Return the best disk that this machine lets us have."""
    return SmallFileSystem.mount(folder) or LimitedFiles(folder)
