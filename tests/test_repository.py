"""What must be true of the repository itself, file by file."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "scripts" / "requirements.lock"
DEV_MARKER = "# ---- What tests and checks add ----"

TOP_LEVEL = {"pyproject.toml", "README.md", "README.zh-CN.md", "app", "tests", "scripts", "deploy"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40

# In pieces, so that this file does not contain what it looks for.
REGISTRY_HOSTS = (
    "pypi" + ".org",
    "python" + "hosted",
    "pypi" + "mirror",
    "/pypi" + "/simple",
    "/sim" + "ple/",
)
MACHINE_PATHS = tuple(
    "/" + name + "/" for name in ("work", "root", "Users", "opt/wheels", "opt/pypi", "tmp/w")
)

# Stand-ins that take time because that is what they stand in for.
# A scripted server that is told to be slow, and worlds whose time is virtual: there a sleep takes none.
MAY_SLEEP = (
    "tests/modelserver.py",
    "tests/fakes.py",
    "tests/cancellation/",
    "tests/simulation/",
    "tests/unit/test_background.py",
)


@cache
def tracked_files() -> tuple[Path, ...]:
    """Return the files that git tracks, or, in an unpacked archive, all that a checkout would have."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [ROOT / name for name in names if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not is_by_product(path.relative_to(ROOT))]
    return tuple(path for path in paths if path.is_file())


def is_by_product(path: Path) -> bool:
    hidden_folder = path.parts[0].startswith(".") and path.parts[0] != ".ci" and len(path.parts) > 1
    return hidden_folder or "__pycache__" in path.parts


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def python_files(folder: str) -> list[Path]:
    return [
        path for path in tracked_files() if path.suffix == ".py" and name_of(path).startswith(f"{folder}/")
    ]


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def count_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the function's lines from ``def`` to its end, without its docstring's."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_only_known_names_at_the_top() -> None:
    """The repository's first level holds the agreed names and dotfiles, nothing else."""
    found = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL


def test_no_registry_host_in_any_file() -> None:
    """No tracked file names a host of a package registry."""
    named = [
        (name_of(path), host) for path in tracked_files() for host in REGISTRY_HOSTS if host in text_of(path)
    ]
    assert named == []


def test_no_machine_path_in_any_file() -> None:
    """No tracked file names a folder of the machine it was made on."""
    pattern = re.compile(r"(?<![\w.}\-/])(" + "|".join(map(re.escape, MACHINE_PATHS)) + ")")
    named = [(name_of(path), found) for path in tracked_files() for found in pattern.findall(text_of(path))]
    assert named == []


def locked_requirements() -> list[str]:
    return re.findall(r"^[A-Za-z0-9].*\n(?:[ \t]+.*\n)*", text_of(LOCK), re.MULTILINE)


def test_lock_has_a_hash_for_every_requirement() -> None:
    """Every locked requirement is one exact version with at least one SHA-256."""
    entry = re.compile(r"[A-Za-z0-9._-]+==\S+( ; [^\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n")
    requirements = locked_requirements()
    assert requirements
    assert [each for each in requirements if not entry.fullmatch(each)] == []


def test_lock_says_nothing_but_requirements() -> None:
    """The lock names no host, no index and no option: only requirements, their hashes and comments."""
    lines = text_of(LOCK).splitlines()
    assert [line for line in lines if "://" in line or line.startswith("-")] == []
    assert lines.count(DEV_MARKER) == 1


def test_lock_fits_the_project_file() -> None:
    """Each dependency that the project declares is locked in its part, in a version that it allows."""
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    extras = project["project"].get("optional-dependencies", {}).values()
    run = [*project["project"]["dependencies"], *(each for extra in extras for each in extra)]
    run_text, _, dev_text = text_of(LOCK).partition(DEV_MARKER)
    assert [each for each in run if not is_locked(each, run_text)] == []
    dev = project["dependency-groups"]["dev"]
    assert [each for each in dev if not is_locked(each, run_text + dev_text)] == []


def is_locked(declared: str, lock: str) -> bool:
    requirement = Requirement(declared)
    found = re.search(rf"^{re.escape(requirement.name)}==([^\s;]+)", lock, re.MULTILINE | re.IGNORECASE)
    return found is not None and requirement.specifier.contains(found[1], prereleases=True)


def test_lock_marker_is_the_launchers() -> None:
    """The launcher splits the lock at the very line that is in it."""
    assert f'DEV_MARKER = "{DEV_MARKER}\\n"' in text_of(ROOT / "scripts" / "dev.py")


def test_ci_runs_the_command_of_the_readme() -> None:
    """CI starts the tests with the command that the README names."""
    command = "python3 scripts/dev.py test"
    assert command in text_of(ROOT / "README.md")
    assert command in text_of(ROOT / ".ci" / "run")


def test_launcher_parses_on_old_pythons() -> None:
    """The launcher uses no syntax younger than Python 3.6, so that it can say what is missing."""
    ast.parse(text_of(ROOT / "scripts" / "dev.py"), feature_version=(3, 6))


def test_no_long_file_in_app() -> None:
    """A file of the application has at most 400 lines."""
    files = [
        path
        for path in tracked_files()
        if path.suffix in {".py", ".sql"} and name_of(path).startswith("app/")
    ]
    lengths = {name_of(path): text_of(path).count("\n") for path in files}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_long_function_in_app() -> None:
    """A function of the application has at most 40 lines beside its docstring."""
    found = [
        (name_of(path), function.name, count_lines(function))
        for path in python_files("app")
        for function in functions_of(ast.parse(text_of(path)))
        if count_lines(function) > MAX_FUNCTION_LINES
    ]
    assert found == []


def test_every_module_of_app_has_a_docstring() -> None:
    """A module of the application says in its first statement what lives there."""
    files = python_files("app")
    assert [name_of(path) for path in files if not ast.get_docstring(ast.parse(text_of(path)))] == []


def test_every_test_has_a_docstring() -> None:
    """A test says in a sentence what is true if it passes."""
    found = [
        (name_of(path), function.name)
        for path in python_files("tests")
        for function in functions_of(ast.parse(text_of(path)))
        if function.name.startswith("test_") and not ast.get_docstring(function)
    ]
    assert found == []


def test_no_test_sleeps() -> None:
    """No test sleeps for a time, it waits for what it needs; ``sleep(0)`` is one turn of the event loop."""
    found = [
        (name_of(path), node.lineno)
        for path in python_files("tests")
        if not name_of(path).startswith(MAY_SLEEP)
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Call) and called_name(node) == "sleep" and not is_zero(node)
    ]
    assert found == []


def is_zero(call: ast.Call) -> bool:
    return [ast.unparse(argument) for argument in call.args] == ["0"]


def called_name(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


SKIPPING_TESTS = """
import pytest

@pytest.mark.skip(reason="not today")
def test_skipped(): ...

@pytest.mark.xfail(reason="known")
def test_expected_to_fail(): assert False

def test_skips_itself(): pytest.skip("not here")
"""


@pytest.mark.parametrize(("ci", "outcome"), [("true", "2 failed, 1 error"), ("", "2 skipped, 1 xfailed")])
def test_ci_fails_on_skips(tmp_path: Path, ci: str, outcome: str) -> None:
    """With CI set, a skipped test and an expected failure count as failures; without it they do not."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_skipping.py").write_text(SKIPPING_TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, str(tmp_path)], env=os.environ | {"CI": ci}, capture_output=True, text=True, check=False
    )
    assert outcome in done.stdout
    assert done.returncode == (1 if ci else 0)
