"""What measures: benchmarks are out of the way of the tests, and nothing here is forgotten."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dev
import pytest

ROOT = Path(__file__).parents[2]


def pytest_run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_benchmarks_work(tmp_path: Path) -> None:
    """Every benchmark does what it is to time, once and untimed, as ``dev.py bench`` would start it."""
    ended = pytest_run(*dev.BENCH, "--benchmark-disable", f"--benchmark-storage={tmp_path.as_uri()}")
    assert ended.returncode == 0, ended.stdout
    assert "skipped" not in ended.stdout


def test_tests_do_not_collect_benchmarks() -> None:
    """Without the options of ``dev.py bench`` there is nothing to collect among the benchmarks."""
    assert pytest_run("--collect-only", "tests/benchmarks").returncode == 5


@pytest.mark.parametrize("command", ["load-test", "measure"])
def test_scripts_find_their_modules(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that the launcher becomes finds the modules beside it, though ``-P`` hides its folder."""
    becomes: list[Any] = []
    monkeypatch.setattr(dev, "prepare", lambda *parts: None)
    monkeypatch.setattr(os, "execve", lambda *started: becomes.append(started))
    dev.COMMANDS[command](["--help"])
    [(_, arguments, environment)] = becomes
    ended = subprocess.run(
        [sys.executable, *arguments[1:]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
