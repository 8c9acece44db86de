"""Real processes that work on a database, most of them killed by SIGKILL while they do."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

TESTS = Path(__file__).parents[1]


async def write_and_kill(path: str, boot_id: str, after: int) -> set[tuple[str, str]]:
    """Let a child write until it has acknowledged ``after`` turns, kill it, return what it said."""
    child = await _start("contract.writing_child", path, boot_id)
    assert child.stdout is not None
    lines = [await child.stdout.readline() for _ in range(after)]
    child.kill()
    lines += (await child.stdout.read()).splitlines(keepends=True)
    await child.wait()
    whole = [line.decode().split() for line in lines if line.endswith(b"\n")]
    return {(session_id, turn_id) for session_id, turn_id in whole}


async def purge_and_die(path: str, now: int, step: int) -> int:
    """Let a child purge what is due at ``now`` and kill itself at a step of SQLite; return its exit code."""
    child = await _start("contract.purging_child", path, str(now), str(step))
    await child.communicate()
    assert child.returncode is not None
    return child.returncode


async def open_and_count(url: str, name: str) -> str:
    """Let a child open the PostgreSQL database and make a session; return how many of its own it saw."""
    child = await _start("contract.opening_child", url, name)
    said, _ = await child.communicate()
    return said.decode().strip()


async def _start(module: str, *arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments,
        stdout=PIPE, cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    )  # fmt: skip
