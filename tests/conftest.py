"""What holds for every test: no setting from outside, repeatable examples, no silent skips in CI."""

import contextlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

SETTING_PREFIXES = (
    "ACCEPT_ AGENT_ AGENTS_ ALIAS_ ALLOWED_ API_ AUDIT_ AUTH_ AUTO_CHECKPOINT_ CHECKPOINT_ COMPACT_ CONTEXT_ "
    "CORS_ DEEPSEEK_ DRAIN_ ENCRYPTION_ JWT_ LEASE_ LOG_ MAX_ MODEL_ NODE_ OLLAMA_ OPENAI_ OVERLOAD_ RATE_ "
    "REDACT_ SESSION_ STORE_ STREAM_ TOOL_ TURN_ USER_"
)
SETTING_NAMES = "HOST PORT APP_NAME HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY"


def scrub_environment() -> None:
    """Remove every variable that the server would read as a setting."""
    for name in list(os.environ):
        if name.upper().startswith(tuple(SETTING_PREFIXES.split())) or name.upper() in SETTING_NAMES.split():
            del os.environ[name]


# At import: a test module may build settings while it is being collected.
scrub_environment()

# Processes that tests start find the code wherever they run.
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("search", parent=settings.get_profile("repeatable"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Work in an empty folder: no ``.env`` is read, no database is left behind."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return refuse_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return refuse_skip(report)


def refuse_skip(report: Report) -> Report:
    """Turn a skip, or an expected failure, into a failure when CI runs the tests."""
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not accept: {report.longrepr}"
    return report
