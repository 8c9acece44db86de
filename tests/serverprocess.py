"""A real server process for tests: started on a free port, its log kept, stopped by a signal.

with ServerProcess(folder, MODEL_PROVIDER="demo") as server:
    server.request("POST", "/chat", {"message": "hi"})      # -> Reply
    for event in server.stream("/chat/stream", {"message": "hi"}): ...
    server.kill()                                            # as kill -9
    server.start()                                           # again, on the same store
"""

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

START_S = 30
STOP_S = 30
ANSWER_S = 60


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


class ServerProcess:
    """``settings`` are environment variables; the store is a file in ``folder``."""

    def __init__(self, folder: Path, *arguments: str, **settings: str) -> None:
        self.folder = folder
        self.arguments = arguments
        self.settings = {"STORE_URL": f"sqlite:///{folder / 'pool.db'}", "LOG_FORMAT": "json", **settings}
        self.log_path = folder / "server.log"
        self.url = ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def has_started(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        return self.log_path.read_text()

    def start(self) -> None:
        """Start and return when it says where it listens; fail with its log if it does not."""
        with self.log_path.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve", "--port", "0", *self.arguments],
                cwd=self.folder,
                env=os.environ | self.settings,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, lines), daemon=True).start()
        line = lines.get(timeout=START_S)
        if not line.startswith("AgentPool listens on "):
            raise AssertionError(f"the server did not start: {line!r}\n{self.log()}")
        self.url = line.removeprefix("AgentPool listens on ").strip()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        assert self._process is not None
        return self._process.wait(STOP_S)

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self.stop(signal.SIGKILL)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """Send one request; ``body`` bytes are sent as they are, anything else as JSON."""
        connection, response = self._open(method, path, body, headers)
        try:
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def stream(
        self, path: str, body: Any = None, *, method: str = "POST", headers: dict[str, str] | None = None
    ) -> "EventReader":
        """Send one request and read its answer as events."""
        return EventReader(*self._open(method, path, body, headers))

    def _open(
        self, method: str, path: str, body: Any, headers: dict[str, str] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=ANSWER_S)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, sent)
        return connection, connection.getresponse()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put("")


class EventReader:
    """The events of a stream, each as its JSON object; ``ids`` are the ``id:`` lines so far."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self.status = response.status
        self.headers = {k.lower(): v for k, v in response.getheaders()}
        self.ids: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for raw in self._response:
                line = raw.decode().rstrip("\r\n")
                if line.startswith("id: "):
                    self.ids.append(line.removeprefix("id: "))
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))
        finally:
            self.close()

    def close(self) -> None:
        """Leave, whether the stream has ended or not."""
        self._response.close()
        self._connection.close()
