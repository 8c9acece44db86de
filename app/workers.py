"""Several server processes on one listening socket, and the process that keeps them running.

Each worker is ``agentpool serve --fd N``: all draw connections from the same socket, and
reach each other by the store. A worker that dies is started again; one that ends before it is ready
ends all, since its successor would fare no better. SIGTERM and SIGINT are passed on, and all is
over when the last worker has drained; SIGHUP replaces one worker after the other, each when its
successor is ready. Should this process die, the workers end as by SIGTERM.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence

from app.background import TaskOwner

PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before a worker that died is started again, if it and those before it did not last ``LASTING_S``."""
LASTING_S = 60.0
_POLL_S = 0.05

_log = logging.getLogger(__name__)


class Supervisor:
    """Keeps ``count`` workers running on ``listener``.

    ``settings`` are environment variables for every worker, where a password is seen by nobody else,
    and ``options`` those of ``agentpool serve``. ``on_ready`` is called once, when all serve.
    """

    def __init__(
        self,
        count: int,
        listener: socket.socket,
        settings: Mapping[str, str],
        options: Sequence[str],
        on_ready: Callable[[], None],
    ) -> None:
        self._count = count
        self._listener = listener
        self._environment = {**os.environ, **settings}
        self._options = options
        self._on_ready = on_ready
        self._tasks = TaskOwner("workers")
        self._places: set[asyncio.Task[None]] = set()
        self._workers: dict[Process, asyncio.Event] = {}  # each with whether it is ready
        self._retired: set[Process] = set()
        self._end_signal: int | None = None
        self._exit_code = 0
        self._has_been_ready = False

    async def run(self) -> int:
        """Run until a signal came and all workers have ended; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        replacing = asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, replacing.set)
        self._tasks.spawn(self._replace_when(replacing), "replacement")
        for _ in range(self._count):
            self._add_place()
        while self._places:
            await asyncio.wait(self._places)
        await self._tasks.close()
        return self._exit_code

    def _add_place(self) -> None:
        place = self._tasks.spawn(self._keep_place(), f"place {len(self._places)}")
        self._places.add(place)
        place.add_done_callback(self._places.discard)

    async def _keep_place(self) -> None:
        """Have one worker running until the end, or until it is replaced."""
        loop = asyncio.get_running_loop()
        failures = 0
        while self._end_signal is None:
            began = loop.time()
            worker = await self._start()
            code = await worker.wait()
            was_ready = self._workers.pop(worker).is_set()
            if worker in self._retired or self._end_signal is not None:
                self._retired.discard(worker)
                return
            if not was_ready:
                _log.error("a worker ended before it was ready, so all end")
                self._exit_code = code or 1
                self._end(signal.SIGTERM)
                return
            failures = 0 if loop.time() - began >= LASTING_S else failures + 1
            pause_s = PAUSES_S[min(failures, len(PAUSES_S)) - 1] if failures else 0.0
            _log.error("worker %d died (code %d); another one starts in %g s", worker.pid, code, pause_s)
            await asyncio.sleep(pause_s)

    async def _start(self) -> Process:
        descriptor = self._listener.fileno()
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "app.cli", "serve"),
            *("--fd", str(descriptor), "--end-with-stdin", *self._options),
            stdin=PIPE,  # never written to: it closes when this process ends, however it ends
            stdout=PIPE,
            pass_fds=(descriptor,),
            env=self._environment,
        )
        self._workers[worker] = asyncio.Event()
        self._tasks.spawn(self._listen_to(worker), f"output of {worker.pid}")
        if self._end_signal is not None:  # it came while this one was being made
            _send(worker, self._end_signal)
        return worker

    async def _listen_to(self, worker: Process) -> None:
        """Note when the worker is ready: then it says where it listens."""
        assert worker.stdout is not None
        ready = self._workers[worker]
        while await worker.stdout.readline():
            ready.set()
            if not self._has_been_ready and self._count_ready() >= self._count:
                self._has_been_ready = True
                self._on_ready()

    def _count_ready(self) -> int:
        return sum(ready.is_set() for ready in self._workers.values())

    def _end(self, number: int) -> None:
        """Pass the signal on; a second one tells the workers not to wait for their turns."""
        self._end_signal = number
        for worker in self._workers:
            _send(worker, number)

    async def _replace_when(self, asked: asyncio.Event) -> None:
        while True:
            await asked.wait()
            asked.clear()
            for worker in list(self._workers):
                await self._replace(worker)

    async def _replace(self, worker: Process) -> None:
        """Start a successor, and end ``worker`` when that is ready."""
        before = set(self._workers)
        self._add_place()
        while self._end_signal is None:
            if any(ready.is_set() for one, ready in self._workers.items() if one not in before):
                self._retired.add(worker)
                _send(worker, signal.SIGTERM)
                return
            await asyncio.sleep(_POLL_S)


def _send(worker: Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        worker.send_signal(number)
