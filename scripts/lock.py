"""Resolve ``pyproject.toml`` into ``scripts/requirements.lock``; started by ``dev.py lock``.

Both parts of the lock come from one resolution, so what tests add never changes the version
of anything that the server runs with. No index, no host: the hashes say what is meant.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dev import DEV_MARKER, LOCK, PYTHON, ROOT, fail, say

HEADER = "# Made by `python3 scripts/dev.py lock` from pyproject.toml.\n"


def find_uv() -> list[str]:
    if shutil.which("uv"):
        return ["uv"]
    if not PYTHON.exists() or subprocess.call([PYTHON, "-c", "import uv"], stderr=subprocess.DEVNULL) != 0:
        fail("`lock` needs uv: put it on the PATH, or `.venv/bin/python -m pip install uv`")
    return [str(PYTHON), "-m", "uv"]


def resolve(uv: list[str], output: Path, *arguments: str) -> list[str]:
    """Let uv resolve the project into ``output``; return the requirements, each with its hashes."""
    command = [
        *uv,
        "pip",
        "compile",
        "pyproject.toml",
        "--all-extras",
        "--output-file",
        str(output),
        "--quiet",
    ]
    command += ["--universal", "--python-version", "3.11", "--only-binary", ":all:", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", *arguments]
    if subprocess.call(command, cwd=ROOT) != 0:
        fail("uv could not resolve pyproject.toml; the lock is unchanged")
    return re.findall(r"^[A-Za-z0-9].*\n(?:[ \t]+.*\n)*", output.read_text(encoding="utf-8"), re.MULTILINE)


def main() -> None:
    uv = find_uv()
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder, "all.txt")
        if LOCK.exists():
            # uv keeps the versions that its output file already names.
            shutil.copy(LOCK, everything)
        known = resolve(uv, everything, "--group", "dev", *sys.argv[1:])
        run = resolve(uv, Path(folder, "run.txt"), "--constraint", str(everything))
    dev = [requirement for requirement in known if requirement not in run]
    LOCK.write_text(HEADER + "".join(run) + DEV_MARKER + "".join(dev), encoding="utf-8")
    say(f"{LOCK.name}: {len(run)} packages to run, {len(dev)} more to test")


if __name__ == "__main__":
    main()
