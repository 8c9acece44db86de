"""What keeps workers running: whom it starts again, whom it replaces, and when it ends them all.

The workers are small shell scripts, which do as the test says.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from app import workers
from app.workers import Supervisor

SOON_S = 20.0
WORKER = """
cd "$0"
mode=$(cat mode)
echo $$ >> started
case $mode in
    failing) exit 3 ;;
    waiting) read _ < gate ;;
    lingering) trap '' TERM ;;
esac
echo $$ >> ready
echo ready
exec cat > /dev/null
"""


class Crew:
    """Two workers of a supervisor. The next ones that start are as ``mode`` says:

    ``ready`` soon, ``failing``, ``waiting`` until the test lets one through the gate, or ``lingering``
    when they are to end, until they are killed.
    """

    def __init__(self, folder: Path, listener: socket.socket) -> None:
        self._folder = folder
        self._shell = folder / "shell"
        self.can_start(True)
        for name in ("started", "ready"):
            (folder / name).touch()
        os.mkfifo(folder / "gate")
        self._gate = os.open(folder / "gate", os.O_RDWR)
        self.mode("ready")
        self.is_ready = asyncio.Event()
        command = (str(self._shell), "-c", WORKER, str(folder))
        self.supervisor = Supervisor(2, listener, {}, [], self.is_ready.set, command=command)
        self.running: asyncio.Task[int] | None = None

    async def start(self) -> set[int]:
        """Start all, and return their process ids when they are ready."""
        self.begin()
        async with asyncio.timeout(SOON_S):
            await self.is_ready.wait()
        return self.alive()

    def begin(self) -> None:
        self.running = asyncio.create_task(self.supervisor.run())

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Return the exit code, after a signal that this very process gets."""
        os.kill(os.getpid(), number)
        return await self.ended()

    async def ended(self) -> int:
        assert self.running is not None
        async with asyncio.timeout(SOON_S):
            return await self.running

    def mode(self, mode: str) -> None:
        (self._folder / "mode").write_text(mode)

    def can_start(self, yes: bool) -> None:
        """Say whether a process can be started at all."""
        if yes:
            self._shell.symlink_to("/bin/sh")
        else:
            self._shell.unlink()

    def let_through(self) -> None:
        os.write(self._gate, b"\n")

    def close(self) -> None:
        os.close(self._gate)

    def started(self) -> list[int]:
        return [int(line) for line in (self._folder / "started").read_text().splitlines()]

    def ready(self) -> set[int]:
        return {int(line) for line in (self._folder / "ready").read_text().splitlines()}

    def alive(self) -> set[int]:
        return {pid for pid in self.started() if is_alive(pid)}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(condition: Callable[[], object]) -> None:
    """Return when ``condition()``, which asks other processes, holds."""
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110  another process cannot set an event of ours
            await asyncio.sleep(0)


@pytest.fixture
async def crew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Crew]:
    monkeypatch.setattr(workers, "PAUSES_S", (0.0, 0.01))
    caplog.set_level(logging.INFO, workers.__name__)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        crew = Crew(tmp_path, listener)
        try:
            yield crew
        finally:
            if crew.running is not None and not crew.running.done():
                await crew.end()
            crew.close()


async def test_one_that_cannot_start_again_leaves_the_others(crew: Crew) -> None:
    """A worker whose successors fail is tried again and again while the other serves, and then is back."""
    victim, other = await crew.start()
    crew.mode("failing")
    os.kill(victim, signal.SIGKILL)
    await until(lambda: len(crew.started()) >= 5)
    assert is_alive(other)
    crew.mode("ready")
    await until(lambda: len(crew.ready()) == 3)
    assert len(crew.alive()) == 2
    assert await crew.end() == 0


async def test_one_that_cannot_start_at_first_ends_all(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    """Before all have been ready, a worker that ends takes the others with it, and its exit code is all's."""
    crew.mode("waiting")
    crew.begin()
    await until(lambda: len(crew.started()) == 2)
    os.kill(crew.started()[0], signal.SIGKILL)
    assert await crew.ended() == -signal.SIGKILL
    assert crew.alive() == set()
    assert "all end" in caplog.text
    assert not crew.is_ready.is_set()


async def test_no_process_to_be_had_is_a_death(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    """A place whose worker cannot be started for a while is filled again when it can."""
    victim, other = await crew.start()
    crew.can_start(False)
    os.kill(victim, signal.SIGKILL)
    await until(lambda: caplog.text.count("cannot be started") >= 2)
    crew.can_start(True)
    await until(lambda: len(crew.ready()) == 3)
    assert is_alive(other)
    assert await crew.end() == 0


async def test_no_process_to_be_had_at_first_is_a_failure(crew: Crew) -> None:
    """If none can be started at all, the exit code says so."""
    crew.can_start(False)
    crew.begin()
    assert await crew.ended() == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_no_pause_outlasts_a_signal(
    crew: Crew, number: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal ends all at once, also while a place waits before it starts another worker."""
    monkeypatch.setattr(workers, "PAUSES_S", (3600.0,))
    victim, _ = await crew.start()
    os.kill(victim, signal.SIGKILL)
    await until(lambda: "another one starts in 3600 s" in caplog.text)
    assert await crew.end(number) == 0
    assert len(crew.started()) == 2


async def test_all_are_replaced(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    """On SIGHUP each has a successor, never more than one at a time."""
    before = await crew.start()
    crew.mode("waiting")
    os.kill(os.getpid(), signal.SIGHUP)
    for count in (3, 4):
        await until(lambda count=count: len(crew.started()) == count)
        assert len(crew.alive() & before) >= 5 - count
        crew.let_through()
    await until(lambda: "every worker is replaced" in caplog.text)
    await until(lambda: not crew.alive() & before)
    assert crew.alive() == set(crew.started()[2:])
    assert len(crew.alive()) == 2
    assert await crew.end() == 0


@pytest.mark.parametrize("mode", ["failing", "waiting"])
async def test_successor_that_does_not_become_ready_changes_nothing(
    crew: Crew, mode: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails or takes too long, it alone goes, the log says so, and the next SIGHUP may succeed."""
    before = await crew.start()
    monkeypatch.setattr(workers, "START_S", 0.05 if mode == "waiting" else 3600)
    crew.mode(mode)
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: "a successor did not become ready" in caplog.text)
    await until(lambda: crew.alive() == before)
    monkeypatch.undo()
    crew.mode("ready")
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: "every worker is replaced" in caplog.text)
    await until(lambda: len(crew.alive()) == 2)
    assert not crew.alive() & before
    assert await crew.end() == 0


async def test_no_process_to_be_had_for_a_successor(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    """A successor that cannot be started changes nothing."""
    before = await crew.start()
    crew.can_start(False)
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: "a successor did not become ready" in caplog.text)
    assert crew.alive() == before
    assert await crew.end() == 0


@pytest.mark.parametrize("victim", [0, 1])
async def test_worker_that_dies_while_all_are_replaced(
    crew: Crew, victim: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is started again in its own place; in the end there are as many as before, and no old one."""
    before = await crew.start()
    crew.mode("waiting")
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: len(crew.started()) == 3)
    crew.mode("ready")
    os.kill(crew.started()[victim], signal.SIGKILL)
    await until(lambda: len(crew.ready()) == 3)
    crew.let_through()
    await until(lambda: "every worker is replaced" in caplog.text)
    await until(lambda: len(crew.alive()) == 2)
    assert not crew.alive() & before
    assert await crew.end() == 0


@pytest.mark.parametrize("victim", [0, 1])
async def test_worker_stays_until_its_own_successor_is_ready(
    crew: Crew, victim: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was started again beside a successor does not count as that, should it be ready first."""
    await crew.start()
    dies, stays = crew.started()[victim], crew.started()[1 - victim]
    crew.mode("waiting")
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: len(crew.started()) == 3)
    crew.mode("ready")
    os.kill(dies, signal.SIGKILL)
    await until(lambda: len(crew.ready()) == 3)
    os.kill(crew.started()[2], signal.SIGKILL)
    await until(lambda: "a successor did not become ready" in caplog.text)
    assert crew.alive() == {stays, crew.started()[3]}
    assert await crew.end() == 0


async def test_worker_that_still_drains_is_not_replaced_again(
    crew: Crew, caplog: pytest.LogCaptureFixture
) -> None:
    """A second SIGHUP replaces those that serve, however long their predecessors take to end."""
    crew.mode("lingering")
    before = await crew.start()
    crew.mode("ready")
    for count in (1, 2):
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda count=count: caplog.text.count("every worker is replaced") == count)
    try:
        assert len(crew.started()) == 6
        await until(lambda: crew.alive() == before | set(crew.started()[4:]))
    finally:
        for pid in before:
            os.kill(pid, signal.SIGKILL)
    assert await crew.end() == 0


async def test_replacement_waits_until_all_have_been_ready(
    crew: Crew, caplog: pytest.LogCaptureFixture
) -> None:
    """A SIGHUP that comes during the start replaces all when that is over."""
    crew.mode("waiting")
    crew.begin()
    await until(lambda: len(crew.started()) == 2)
    before = set(crew.started())
    crew.mode("ready")
    os.kill(os.getpid(), signal.SIGHUP)
    crew.let_through()
    crew.let_through()
    await until(lambda: "every worker is replaced" in caplog.text)
    assert len(crew.started()) == 4
    await until(lambda: crew.alive() == set(crew.started()) - before)
    assert await crew.end() == 0


async def test_end_comes_before_a_successor(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    """A signal to end while a successor starts ends that too, and blames nobody."""
    await crew.start()
    crew.mode("waiting")
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: len(crew.started()) == 3)
    assert await crew.end() == 0
    assert crew.alive() == set()
    assert caplog.text == ""
