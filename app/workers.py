"""Several server processes on one listening socket, and the process that keeps them running.

Each worker is ``agentpool serve --fd N``: all draw connections from the same socket, and
reach each other by the store. Until all have been ready, one that ends before it is ready ends all,
since its successor would fare no better; later a worker that dies is started again, as often as
it takes. SIGTERM and SIGINT are passed on, and all is over when the last worker has drained;
SIGHUP replaces one worker after the other, each when its successor is ready, and stops at one that
does not become so. Should this process die, the workers end as by SIGTERM.

Whatever ends or fails, there is one *place* for each worker that is to run, and one more while
a successor starts: who fills a place again, and who is replaced, is decided by place.
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
START_S = 60.0
"""A successor that is not ready by then is given up; a start takes a second."""
SERVE = (sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "app.cli", "serve")

_log = logging.getLogger(__name__)


class Supervisor:
    """Keeps ``count`` workers running on ``listener``.

    ``settings`` are environment variables for every worker, where a password is seen by nobody else,
    and ``options`` those of ``agentpool serve``. ``on_ready`` is called once, when all serve.
    ``command`` starts a worker, which prints a line when it is ready.
    """

    def __init__(
        self,
        count: int,
        listener: socket.socket,
        settings: Mapping[str, str],
        options: Sequence[str],
        on_ready: Callable[[], None],
        *,
        command: Sequence[str] = SERVE,
    ) -> None:
        self._count = count
        self._listener = listener
        self._environment = {**os.environ, **settings}
        self._command = (*command, "--fd", str(listener.fileno()), "--end-with-stdin", *options)
        self._on_ready = on_ready
        self._tasks = TaskOwner("workers")
        self._places: dict[_Place, asyncio.Task[None]] = {}
        self._have_all_been_ready = asyncio.Event()
        self._replacement: asyncio.Task[None] | None = None
        self._exit_code = 0

    async def run(self) -> int:
        """Run until a signal came and all workers have ended; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        asked = asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, asked.set)
        self._replacement = self._tasks.spawn(self._replace_when(asked), "replacement")
        for _ in range(self._count):
            self._add_place()
        while self._places:
            await asyncio.wait(self._places.values())
        await self._tasks.close()
        return self._exit_code

    def _add_place(self) -> "_Place":
        place = _Place()
        task = self._tasks.spawn(self._keep(place), f"place {len(self._places)}")
        self._places[place] = task
        task.add_done_callback(lambda _: self._remove(place))
        return place

    def _remove(self, place: "_Place") -> None:
        del self._places[place]
        if not place.has_been_ready.done():
            place.has_been_ready.set_result(False)

    async def _keep(self, place: "_Place") -> None:
        """Have one worker running in ``place`` until that is over or given up."""
        loop = asyncio.get_running_loop()
        failures = 0
        while not place.is_over.is_set():
            began = loop.time()
            code, end = await self._run_worker(place)
            if place.is_over.is_set() or self._gives_up(place, code, end):
                return
            failures = 0 if loop.time() - began >= LASTING_S else failures + 1
            pause_s = PAUSES_S[min(failures, len(PAUSES_S)) - 1] if failures else 0.0
            _log.error("%s; another one starts in %g s", end, pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await place.is_over.wait()

    async def _run_worker(self, place: "_Place") -> tuple[int, str]:
        """Start a worker and wait until it has ended; return its exit code, and what to say of its end."""
        try:
            worker = await self._start()
        except OSError as error:  # too many processes or open files, no memory
            return 1, f"a worker cannot be started: {error}"
        place.worker = worker
        self._tasks.spawn(self._listen_to(place, worker), f"output of {worker.pid}")
        if place.is_over.is_set():  # while this one was being made
            place.end()
        code = await worker.wait()
        return code, f"worker {worker.pid} died (code {code})"

    async def _start(self) -> Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            stdin=PIPE,  # never written to: it closes when this process ends, however it ends
            stdout=PIPE,
            pass_fds=(self._listener.fileno(),),
            env=self._environment,
        )

    def _gives_up(self, place: "_Place", code: int, end: str) -> bool:
        """Say whether nothing more is to start in ``place``, and end all if they are just starting."""
        if place.has_been_ready.done():
            return False
        if self._have_all_been_ready.is_set():
            _log.error("%s; no other one starts in its place", end)
        else:
            _log.error("%s; all end, since not all were ready yet", end)
            self._exit_code = code or 1
            self._end(signal.SIGTERM)
        return True

    async def _listen_to(self, place: "_Place", worker: Process) -> None:
        """Note when the worker is ready: then it says where it listens."""
        assert worker.stdout is not None
        while await worker.stdout.readline():
            if place.has_been_ready.done():
                continue
            place.has_been_ready.set_result(True)
            ready = sum(one.has_been_ready.done() for one in self._places)
            if ready == self._count and not self._have_all_been_ready.is_set():
                self._have_all_been_ready.set()
                self._on_ready()

    def _end(self, number: int) -> None:
        """Pass the signal on; a second one tells the workers not to wait for their turns."""
        if self._replacement is not None:
            self._replacement.cancel()
        for place in self._places:
            place.end(number)

    async def _replace_when(self, asked: asyncio.Event) -> None:
        await self._have_all_been_ready.wait()
        while True:
            await asked.wait()
            asked.clear()
            await self._replace_all()

    async def _replace_all(self) -> None:
        serving = [(place, place.worker) for place in self._places if not place.is_over.is_set()]
        for place, worker in serving:
            # One that died meanwhile has, or gets, a successor in its own place.
            if place.worker is not worker or worker is None or worker.returncode is not None:
                continue
            if not await self._replace(place):
                _log.error("a successor did not become ready; workers that have none yet stay")
                return
        _log.info("every worker is replaced")

    async def _replace(self, place: "_Place") -> bool:
        """Start a successor, and end ``place`` when that is ready; say whether it became so."""
        successor = self._add_place()
        ready = successor.has_been_ready
        await asyncio.wait([ready], timeout=START_S)
        is_ready = ready.done() and ready.result()
        # The place, not the worker: that one may have died, and another be about to start there.
        (place if is_ready else successor).end()
        return is_ready


class _Place:
    """Where one worker runs, and when it has died the next.

    ``has_been_ready`` is done when a worker here was ready for the first time, or none will be;
    ``is_over`` says that what runs here ends, and that nothing more starts.
    """

    def __init__(self) -> None:
        self.worker: Process | None = None
        self.has_been_ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.is_over = asyncio.Event()

    def end(self, number: int = signal.SIGTERM) -> None:
        self.is_over.set()
        if self.worker is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                self.worker.send_signal(number)
