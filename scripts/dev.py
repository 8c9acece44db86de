#!/usr/bin/env python3
"""Make the environment, then become what was asked for: server, tests, checks, load test.

Standard library only. ``.venv`` beside ``pyproject.toml`` is made from
``scripts/requirements.lock``, whose first part is what the server needs and whose second
part is what tests and checks add. Where packages come from is pip's own configuration.

True between any two starts:

* ``.venv`` with a matching stamp is complete; without one it is made afresh;
* the stamp is removed before anything in ``.venv`` changes and written last;
* one launch at a time changes ``.venv``.

``run`` keeps the current directory (``.env`` and the default database belong to it), so the
code is found through ``PYTHONPATH``, and ``-P`` keeps a folder named ``app`` there from
being taken for ours. ``test`` and ``check`` work in the repository's folder.
"""

import os
import subprocess
import sys

PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")


def become_newer_python() -> None:
    """Start again under a Python that is new enough, or say that there is none.

    This file must parse, and run to this point, on Pythons that are too old.
    """
    for name in PYTHONS:
        probe = [name, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.call(probe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
                os.execvp(name, [name] + sys.argv)  # noqa: RUF005
        except OSError:
            continue
    found = ".".join(str(part) for part in sys.version_info[:3])
    sys.exit("dev.py: Python 3.11 or newer is needed; this is " + found + " and the PATH has no newer one")


if sys.version_info < (3, 11):
    become_newer_python()
if os.name != "posix":
    sys.exit("dev.py: Linux or macOS is needed (on Windows: WSL)")

import fcntl
import hashlib
import importlib.util
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

USAGE = """\
python3 scripts/dev.py <command> [arguments]

  run [server arguments]       start the server (run --help lists them)
  test [pytest arguments]      run the tests
  check                        ruff, mypy, import-linter
  load-test [its arguments]    drive a running server (load-test --help lists them)
  measure [its arguments]      what agents, restores and a growing store cost, without a server
  bench [pytest arguments]     time the parts: pool, store, encoder, translation
  lock [uv arguments]          maintainers: resolve scripts/requirements.lock again
                               (keeps what still fits; --upgrade takes the newest)
"""

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
LOCK = SCRIPTS / "requirements.lock"
DEV_MARKER = "# ---- What tests and checks add ----\n"
NO_INSTALL = "AGENTPOOL_NO_INSTALL"

VENV = ROOT / ".venv"
BIN = VENV / "bin"
PYTHON = BIN / "python"
STAMP = VENV / "stamp.json"
SITE_PACKAGES = VENV / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

# These would let another installation in, or send packages elsewhere.
FOREIGN_VARIABLES = frozenset(
    {"PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "__PYVENV_LAUNCHER__", "VIRTUAL_ENV"}
    | {"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER"}
)

CHECKS = (
    ("ruff check", ("ruff", "check", "--output-format", "concise", ".")),
    ("ruff format", ("ruff", "format", "--check", ".")),
    ("mypy", ("mypy",)),
    ("import-linter", ("lint-imports", "--no-logo")),
)

BENCH = (
    *("tests/benchmarks", "-p", "benchmark", "-o", "python_files=bench_*.py"),
    *("--benchmark-time-unit=us", "--benchmark-columns=min,median,max"),
)

PIP_FAILURES = (
    (
        r"DO NOT MATCH THE HASHES[\s\S]*?^\s+(\S+==[^\s:;]+)",
        "a downloaded file is not the one that the lock names: {}",
    ),
    (r"No space left on device", "no space left on the device"),
    (
        r"NewConnectionError|ConnectTimeout|ConnectionError|ReadTimeout|ProxyError|SSLError|CERTIFICATE_VERIFY"
        r"|ProtocolError|NameResolutionError|Network is unreachable|timed out",
        "the package registry cannot be reached; see the network and `pip config list`",
    ),
    (
        r"from versions: none\)[\s\S]*No matching distribution found for (\S+)",
        "pip's configured registry does not offer {}, or cannot be reached; see `pip config list`",
    ),
    (
        r"No matching distribution found for (\S+)",
        f"the registry has no wheel of {{}} for this Python ({sys.version.split()[0]}, {sys.platform})",
    ),
)


@dataclass(frozen=True)
class Work:
    """What is to be done before ``.venv`` can be used, and why."""

    reason: str
    afresh: bool
    parts: tuple[str, ...]


def say(line: str) -> None:
    print(f"dev.py: {line}", file=sys.stderr, flush=True)


def fail(line: str) -> NoReturn:
    sys.exit(f"dev.py: {line}")


# The environment: what it should be, and what is there


def read_lock() -> dict[str, str]:
    """Return the lock's two parts, ``run`` and ``dev``."""
    if not LOCK.exists():
        fail(f"{LOCK} is missing; a maintainer makes it with `python3 scripts/dev.py lock`")
    run, marker, dev = LOCK.read_text(encoding="utf-8").partition(DEV_MARKER)
    if not marker:
        fail(f"{LOCK} has no line {DEV_MARKER.strip()!r}")
    return {"run": run, "dev": dev}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def python_identity() -> str:
    return f"{sys.implementation.cache_tag} {sys.platform} {os.uname().machine}"


def list_installed() -> list[str]:
    return sorted(set(os.listdir(SITE_PACKAGES)) - {"__pycache__"})


def find_stamp() -> dict[str, Any] | None:
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and isinstance(stamp.get("parts"), dict) else None


def write_stamp(parts: dict[str, str]) -> None:
    stamp = {"root": str(ROOT), "python": python_identity(), "parts": parts, "installed": list_installed()}
    new = STAMP.with_suffix(".new")
    new.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    new.replace(STAMP)


def why_unusable(stamp: dict[str, Any] | None) -> str | None:
    if not VENV.exists():
        return "there is none yet"
    if stamp is None:
        return "it is incomplete or not ours"
    if stamp.get("root") != str(ROOT):
        return "the folder was moved"
    if stamp.get("python") != python_identity():
        return f"it was made by {stamp.get('python')}"
    if not os.access(PYTHON, os.X_OK):
        return "its Python is gone"
    if not SITE_PACKAGES.is_dir() or not set(stamp.get("installed", ())) <= set(os.listdir(SITE_PACKAGES)):
        return "packages are missing from it"
    return None


def find_work(lock: dict[str, str], wanted: tuple[str, ...]) -> Work | None:
    """Return what is to be done before the ``wanted`` parts of the lock can be used."""
    stamp = find_stamp()
    reason = why_unusable(stamp)
    if reason is not None or stamp is None:
        return Work(reason or "it is incomplete", True, wanted)
    have = stamp["parts"]
    if any(part in have and have[part] != digest(lock[part]) for part in wanted):
        return Work("the lock has changed", True, wanted)
    missing = tuple(part for part in wanted if part not in have)
    return Work("tests and checks need more", False, missing) if missing else None


# The environment: making it


def prepare(*wanted: str) -> None:
    """Return when ``.venv`` holds the ``wanted`` parts of the lock; usually at once."""
    lock = read_lock()
    work = find_work(lock, wanted)
    if work is None:
        return
    if os.environ.get(NO_INSTALL):
        fail(f"{VENV} is not ready ({work.reason}) and {NO_INSTALL} forbids to change it")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with only_launch() as guard:
        # Another launch may have done the work while this one waited.
        work = find_work(lock, wanted)
        if work is not None:
            carry_out(work, lock, guard)


@contextmanager
def only_launch() -> Iterator[int]:
    """Wait until no other launch changes ``.venv``; yield the descriptor that says so."""
    with open(ROOT / ".venv.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another launch is preparing .venv; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def carry_out(work: Work, lock: dict[str, str], guard: int) -> None:
    stamp = find_stamp()
    have = {} if work.afresh or stamp is None else dict(stamp["parts"])
    STAMP.unlink(missing_ok=True)
    began = time.monotonic()
    if work.afresh:
        make_venv(work.reason, guard)
    else:
        say(f"adding to .venv ({work.reason}) …")
    install(work.parts, lock, guard)
    write_stamp(have | {part: digest(lock[part]) for part in work.parts})
    say(f".venv is ready ({time.monotonic() - began:.0f} s)")


def make_venv(reason: str, guard: int) -> None:
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
        fail(f"this Python lacks venv or ensurepip; on Debian and Ubuntu: apt install python{minor}-venv")
    say(f"making .venv ({reason}) and installing the locked packages …")
    if VENV.is_symlink():
        VENV.unlink()
    elif VENV.exists():
        shutil.rmtree(VENV)
    # The running Python may itself be the one in the .venv that was just removed.
    base = getattr(sys, "_base_executable", None) or sys.executable
    made = call([base, "-m", "venv", str(VENV)], guard)
    if made.returncode != 0:
        fail(f"`{base} -m venv` failed: {last_line(made.stdout)}")


def install(parts: tuple[str, ...], lock: dict[str, str], guard: int) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    for part in parts:
        requirements = VENV / f"{part}.txt"
        requirements.write_text(lock[part], encoding="utf-8")
        command += ["-r", str(requirements)]
    done = call(command, guard)
    if done.returncode != 0:
        fail(explain(done.stdout))


def call(command: list[str], guard: int) -> "subprocess.CompletedProcess[str]":
    # The child inherits the guard: if this process is killed, the next launch still
    # waits for what the child is doing to .venv.
    return subprocess.run(
        command,
        env=own_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=(guard,),
        check=False,
    )


def explain(output: str) -> str:
    """Return one line that says why pip failed, after showing its errors if the line cannot."""
    for pattern, sentence in PIP_FAILURES:
        found = re.search(pattern, output, re.MULTILINE)
        if found:
            return "installing failed: " + sentence.format(*found.groups())
    sys.stderr.write(output)
    return f"installing failed: {last_line(output)}"


def last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else "no reason given"


# The commands


def own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}


def become(*arguments: str, **variables: str) -> NoReturn:
    """Replace this process by the environment's Python: same process id, nothing in between."""
    sys.stdout.flush()
    sys.stderr.flush()
    environment = own_environment() | {"PYTHONPATH": str(ROOT), "VIRTUAL_ENV": str(VENV)} | variables
    os.execve(PYTHON, [str(PYTHON), "-P", *arguments], environment)


def run(arguments: list[str]) -> NoReturn:
    prepare("run")
    become("-m", "app.cli", "serve", *arguments)


def test(arguments: list[str]) -> NoReturn:
    prepare("run", "dev")
    os.chdir(ROOT)
    become("-m", "pytest", *arguments, PYTHONUTF8="1", PYTHONUNBUFFERED="1")


def become_script(name: str, arguments: list[str]) -> NoReturn:
    prepare("run", "dev")
    # -P keeps the script's own folder from being searched, where the modules beside it are.
    become(str(SCRIPTS / name), *arguments, PYTHONPATH=os.pathsep.join((str(ROOT), str(SCRIPTS))))


def bench(arguments: list[str]) -> NoReturn:
    prepare("run", "dev")
    os.chdir(ROOT)
    # `test` neither collects these files, which are named otherwise, nor loads the plugin.
    become("-m", "pytest", *BENCH, *arguments, PYTHONUTF8="1", PYTHONUNBUFFERED="1")


def check(arguments: list[str]) -> NoReturn:
    if arguments:
        fail(f"check takes no arguments, not {arguments[0]!r}")
    prepare("run", "dev")
    # A list, not a generator: every tool has its say, also after one has failed.
    passed = [has_passed(name, command) for name, command in CHECKS]
    sys.exit(0 if all(passed) else 1)


def has_passed(name: str, command: tuple[str, ...]) -> bool:
    began = time.monotonic()
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=ROOT,
        env=own_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    verdict = "passed" if done.returncode == 0 else "FAILED"
    print(f"{name:<14} {verdict} {time.monotonic() - began:6.1f} s", flush=True)
    if done.returncode != 0:
        sys.stdout.write(done.stdout.decode(errors="replace"))
    return done.returncode == 0


def lock(arguments: list[str]) -> NoReturn:
    os.execv(sys.executable, [sys.executable, str(ROOT / "scripts" / "lock.py"), *arguments])


COMMANDS: dict[str, Callable[[list[str]], NoReturn]] = {
    "run": run,
    "test": test,
    "check": check,
    "load-test": partial(become_script, "load_test.py"),
    "measure": partial(become_script, "measure.py"),
    "bench": bench,
    "lock": lock,
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    if name not in COMMANDS:
        sys.stderr.write(USAGE)
        fail(f"there is no command {name!r}")
    try:
        COMMANDS[name](sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))


if __name__ == "__main__":
    main()
