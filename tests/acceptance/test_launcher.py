"""The launcher as real processes: its own small repository, with wheels made on the spot.

No test here needs a network, and none touches the environment that it runs in.
"""

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEV_MARKER = "# ---- What tests and checks add ----\n"
MADE, ADDED = "making .venv", "adding to .venv"

# A stand-in for the application: says who it is, then waits for a signal if asked to.
APP_CLI = """
import json, os, signal, sys
import engine
if "--wait" in sys.argv:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
who = {"pid": os.getpid(), "cwd": os.getcwd(), "arguments": sys.argv[1:], "prefix": sys.prefix}
print(json.dumps(who), flush=True)
if "--wait" in sys.argv:
    print("signal", signal.sigwait({signal.SIGTERM}), flush=True)
"""

# Makes the Python that was started under the name "old-python" look older than it is.
OLD_PYTHON = """
import os, sys
if os.path.basename(sys.orig_argv[0]) == "old-python":
    sys.version_info = (3, 8, 1, "final", 0)
if os.environ.get("HIDE_ENSUREPIP"):
    sys.modules["ensurepip"] = None
"""

TOOL = "import sys\nfrom pathlib import Path\nsys.exit(Path('broken').read_text() == '{name}')\n"


def make_wheel(folder: Path, name: str, files: dict[str, str], scripts: dict[str, str]) -> str:
    """Write a wheel; return its line for the lock."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    contents = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if scripts:
        lines = "".join(f"{script} = {target}\n" for script, target in scripts.items())
        contents[f"{info}/entry_points.txt"] = f"[console_scripts]\n{lines}"
    record = "".join(f"{file},{record_hash(text)},{len(text)}\n" for file, text in contents.items())
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in contents.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return f"{name}==1.0 \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def record_hash(text: str) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@dataclass
class Checkout:
    """A repository of the launcher's shape, and how to start the launcher in it."""

    root: Path
    wheels: Path
    environment: dict[str, str]
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def lock(self) -> Path:
        return self.root / "scripts" / "requirements.lock"

    def start(self, *arguments: str, python: str = "", **variables: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [python or base_python(), str(self.root / "scripts" / "dev.py"), *arguments],
            cwd=self.wheels,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()

    def call(self, *arguments: str, python: str = "", **variables: str) -> tuple[int, str, str]:
        """Run the launcher to its end; return its code, output and messages."""
        process = self.start(*arguments, python=python, **variables)
        output, messages = process.communicate(timeout=60)
        return process.returncode, output, messages


def base_python() -> str:
    return str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}")


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    root, wheels, site = tmp_path / "checkout", tmp_path / "elsewhere", tmp_path / "site"
    for folder in (root / "scripts", root / "app", wheels, site):
        folder.mkdir(parents=True)
    (root / "scripts" / "dev.py").write_bytes((ROOT / "scripts" / "dev.py").read_bytes())
    (root / "app" / "__init__.py").write_text("")
    (root / "app" / "cli.py").write_text(APP_CLI)
    (root / "broken").write_text("")
    (site / "sitecustomize.py").write_text(OLD_PYTHON)
    engine = make_wheel(wheels, "engine", {"engine.py": "", "app/__init__.py": "raise ImportError"}, {})
    tools = {name: f"{name.replace('-', '_')}_tool" for name in ("ruff", "mypy", "lint-imports")}
    files = {f"{module}.py": TOOL.format(name=name) for name, module in tools.items()}
    files["pytest.py"] = "import json, os, sys; print(json.dumps([os.getpid(), os.getcwd(), sys.argv[1:]]))"
    checks = make_wheel(wheels, "checks", files, {name: f"{module}:sys" for name, module in tools.items()})
    lock = root / "scripts" / "requirements.lock"
    lock.write_text(engine + DEV_MARKER + checks)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull,
    }
    checkout = Checkout(root, wheels, environment)
    yield checkout
    checkout.close()


def test_run_becomes_the_server(checkout: Checkout) -> None:
    """The launcher's process is the server's: same id, same directory, its arguments, one signal."""
    process = checkout.start("run", "--wait", "--port", "0")
    assert process.stdout is not None
    server = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    rest, messages = process.communicate(timeout=10)
    assert server["pid"] == process.pid
    assert server["cwd"] == str(checkout.wheels)
    assert server["arguments"] == ["serve", "--wait", "--port", "0"]
    assert server["prefix"] == str(checkout.root / ".venv")
    assert rest == f"signal {int(signal.SIGTERM)}\n"
    assert MADE in messages


def test_second_start_installs_nothing(checkout: Checkout) -> None:
    """A start with a complete environment is silent, calls no pip and leaves the stamp alone."""
    assert checkout.call("run")[0] == 0
    stamp = checkout.root / ".venv" / "stamp.json"
    before = (stamp.stat().st_ino, stamp.stat().st_mtime_ns)
    code, _, messages = checkout.call("run", PIP_FIND_LINKS="")
    assert (code, messages) == (0, "")
    assert (stamp.stat().st_ino, stamp.stat().st_mtime_ns) == before


def test_code_beside_the_user_is_not_taken_for_ours(checkout: Checkout) -> None:
    """A folder named app in the current directory or in a package does not hide the application."""
    (checkout.wheels / "app").mkdir()
    (checkout.wheels / "app" / "cli.py").write_text("raise SystemExit('the wrong app')")
    code, output, messages = checkout.call("run")
    assert code == 0, messages
    assert json.loads(output)["arguments"] == ["serve"]


def test_test_tools_come_only_when_asked_for(checkout: Checkout) -> None:
    """``run`` installs the first part of the lock; ``test`` adds the second and becomes pytest."""
    checkout.call("run")
    packages = checkout.root / ".venv" / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
    assert not (packages / "pytest.py").exists()
    process = checkout.start("test", "-k", "some")
    output, messages = process.communicate(timeout=60)
    assert json.loads(output) == [process.pid, str(checkout.root), ["-k", "some"]]
    assert ADDED in messages
    assert checkout.call("run")[2] == ""


@pytest.mark.parametrize(
    ("harm", "reason"),
    [("interrupted", "incomplete"), ("moved", "moved"), ("python", "Python is gone"), ("package", "missing")],
)
def test_broken_environment_is_made_afresh(checkout: Checkout, harm: str, reason: str) -> None:
    """An interrupted, moved or damaged environment is noticed and made again."""
    checkout.call("run")
    break_environment(checkout, harm)
    code, output, messages = checkout.call("run")
    assert code == 0, messages
    assert MADE in messages
    assert reason in messages
    assert json.loads(output)["prefix"] == str(checkout.root / ".venv")


def break_environment(checkout: Checkout, harm: str) -> None:
    venv = checkout.root / ".venv"
    if harm == "interrupted":
        (venv / "stamp.json").unlink()
    elif harm == "moved":
        checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    elif harm == "python":
        (venv / "bin" / "python").unlink()
    else:
        (venv / "lib" / f"python3.{sys.version_info[1]}" / "site-packages" / "engine.py").unlink()


def test_changed_lock_is_followed(checkout: Checkout) -> None:
    """A lock that changed since the environment was made leads to a new environment."""
    checkout.call("run")
    extra = make_wheel(checkout.wheels, "extra", {"extra.py": ""}, {})
    checkout.lock.write_text(extra + checkout.lock.read_text())
    code, _, messages = checkout.call("run")
    assert code == 0
    assert "the lock has changed" in messages


def test_two_launches_at_once(checkout: Checkout) -> None:
    """Of two first starts at the same time one makes the environment and both become servers."""
    first, second = checkout.start("run"), checkout.start("run")
    ends = [first.communicate(timeout=60), second.communicate(timeout=60)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert sum(MADE in messages for _, messages in ends) == 1
    assert {json.loads(output)["pid"] for output, _ in ends} == {first.pid, second.pid}


def test_terminated_while_installing(checkout: Checkout) -> None:
    """A launch that is ended while it installs leaves nothing that the next one takes for complete."""
    process = checkout.start("run")
    assert process.stderr is not None
    assert MADE in process.stderr.readline()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert checkout.call("run")[0] == 0


def test_hash_mismatch_is_one_clear_line(checkout: Checkout) -> None:
    """A file with another hash than the lock's is refused, named, and not installed."""
    text = checkout.lock.read_text()
    wrong = text.replace("sha256:", "sha256:" + "0" * 8, 1)
    checkout.lock.write_text(wrong.replace("0" * 8 + text.partition("sha256:")[2][:64], "0" * 64))
    code, _, messages = checkout.call("run")
    assert code == 1
    assert "not the one that the lock names: engine==1.0" in messages.splitlines()[-1]
    assert len(messages.splitlines()) == 2


@pytest.mark.parametrize("variables", [{"PIP_FIND_LINKS": ""}, {"PIP_NO_INDEX": "0", "PIP_RETRIES": "1"}])
def test_no_registry_is_one_clear_line(checkout: Checkout, variables: dict[str, str]) -> None:
    """Without a registry that answers, the launcher says so in one line and ends."""
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_FIND_LINKS": ""}
    code, _, messages = checkout.call("run", **(unreachable | variables))
    assert code == 1
    assert "registry" in messages.splitlines()[-1]
    assert len(messages.splitlines()) == 2


def test_missing_ensurepip_names_the_package(checkout: Checkout) -> None:
    """On a Python without ensurepip the launcher names the package that brings it."""
    code, _, messages = checkout.call("run", HIDE_ENSUREPIP="1")
    assert code == 1
    assert f"apt install python3.{sys.version_info[1]}-venv" in messages
    assert len(messages.splitlines()) == 1


@pytest.fixture
def old_python(tmp_path: Path) -> str:
    link = tmp_path / "old-python"
    link.symlink_to(base_python())
    return str(link)


def test_old_python_alone_is_one_clear_line(checkout: Checkout, old_python: str, tmp_path: Path) -> None:
    """Under a Python that is too old, with no newer one on the PATH, one line says what is needed."""
    code, _, messages = checkout.call("run", python=old_python, PATH=str(tmp_path))
    assert code == 1
    assert messages == "dev.py: Python 3.11 or newer is needed; this is 3.8.1 and the PATH has no newer one\n"


def test_old_python_finds_a_newer_one(checkout: Checkout, old_python: str) -> None:
    """Under a Python that is too old, the launcher goes on with a newer one from the PATH."""
    code, output, messages = checkout.call("run", python=old_python, PATH=str(Path(base_python()).parent))
    assert code == 0, messages
    assert json.loads(output)["arguments"] == ["serve"]


def test_installing_can_be_forbidden(checkout: Checkout) -> None:
    """With AGENTPOOL_NO_INSTALL the launcher refuses to change the environment."""
    code, _, messages = checkout.call("run", AGENTPOOL_NO_INSTALL="1")
    assert code == 1
    assert "forbids" in messages
    assert not (checkout.root / ".venv").exists()


def test_check_runs_every_tool(checkout: Checkout) -> None:
    """``check`` succeeds when every tool does."""
    code, output, _ = checkout.call("check")
    assert code == 0, output
    assert [line.split("  ")[0] for line in output.splitlines()] == [
        "ruff check",
        "ruff format",
        "mypy",
        "import-linter",
    ]


def test_check_fails_when_one_tool_fails(checkout: Checkout) -> None:
    """``check`` runs the tools after a failed one too, and fails."""
    (checkout.root / "broken").write_text("mypy")
    code, output, _ = checkout.call("check")
    assert code == 1
    assert [line.split()[-3] for line in output.splitlines()] == ["passed", "passed", "FAILED", "passed"]


def test_unknown_command(checkout: Checkout) -> None:
    """A command that does not exist is refused, with the ones that do."""
    code, _, messages = checkout.call("serve")
    assert code == 1
    assert messages.endswith("there is no command 'serve'\n")


def start_server(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start the real server from ``folder``, in the environment that the tests run in."""
    return subprocess.Popen(
        [base_python(), str(ROOT / "scripts" / "dev.py"), "run", "--port", "0", *arguments],
        cwd=folder,
        env=os.environ | {"AGENTPOOL_NO_INSTALL": "1", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_url(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return found[0]
    raise AssertionError("the server ended: " + "".join(seen))


def test_server_answers_within_three_seconds(tmp_path: Path) -> None:
    """With the environment in place, a start on a free port answers its first request in under 3 s."""
    began = time.monotonic()
    process = start_server(tmp_path)
    try:
        with urllib.request.urlopen(wait_for_url(process) + "/health", timeout=10) as response:
            health = json.load(response)
        took_s = time.monotonic() - began
        assert health["status"] == "healthy"
        assert took_s < 3
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_server_ends_with_one_signal(tmp_path: Path) -> None:
    """One SIGTERM ends the server, and its database lies where it was started."""
    process = start_server(tmp_path)
    try:
        wait_for_url(process)
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM), output
    assert (tmp_path / "agentpool.db").exists()
