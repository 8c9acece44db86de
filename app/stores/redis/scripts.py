"""The Lua scripts, each behind the prelude that all share. Their first argument is the prefix of all keys."""

import hashlib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

NAMES = (
    "apply", "boot", "bound", "checkpoint", "create", "giveback", "holder", "node", "page", "purge",
    "reap", "remove", "renew", "sessions", "shared", "start", "sweep", "take", "turns", "walk",
)  # fmt: skip


class Script(NamedTuple):
    """``sha`` is the SHA-1 by which a server that has the script knows it."""

    text: str
    sha: str


@cache
def load_scripts() -> dict[str, Script]:
    folder = files("app.stores") / "lua"
    prelude = (folder / "common.lua").read_text("utf-8")
    scripts = {}
    for name in NAMES:
        text = prelude + (folder / f"{name}.lua").read_text("utf-8")
        # What names a script to Redis, nothing secret.
        scripts[name] = Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
    return scripts
