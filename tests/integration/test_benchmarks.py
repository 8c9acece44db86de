"""The micro-benchmarks: out of the way of the tests, and not forgotten."""

import subprocess
import sys
from pathlib import Path

import dev

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
