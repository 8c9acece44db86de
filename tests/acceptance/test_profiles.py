"""Agent profiles with a real process: the README's file, a changed one, a broken one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.modelserver import ModelServer
from tests.serverprocess import ServerProcess

README = (Path(__file__).parents[2] / "README.md").read_text()
CANARY = "sk-canary-0123456789"


def write(folder: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "agents.json").write_text(text)


def test_example_of_the_readme_works(tmp_path):
    """The file that README.md shows, with its tool beside it, wherever that is, makes an agent."""
    (example,) = re.findall(r"^```json\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    package = tmp_path / "config" / "my_tools"
    package.mkdir(parents=True)
    write(package.parent, example)
    (package / "clock.py").write_text(
        'async def now() -> str:\n    """Tell the time."""\n    return "noon"\n'
    )
    with ServerProcess(tmp_path, AGENTS_FILE="config/agents.json", OPENAI_API_KEY="k") as server:
        agents = server.request("GET", "/agents").body["agents"]
        assert [agent["agent_id"] for agent in agents] == ["assistant", "coder"]
        assert agents[1]["tools"] == ["now"]


def test_changed_file_counts_after_kill_and_restart(tmp_path):
    """A session that was live when its process was killed goes on with the prompt of the new file."""
    with ModelServer() as model:
        settings = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": model.base_url, "OPENAI_MODEL": "m"}
        write(tmp_path, {"agents": {"coder": {"system_prompt": "Old."}}})
        with ServerProcess(tmp_path, AGENTS_FILE="agents.json", **settings) as server:
            server.request("POST", "/chat", {"session_id": "a", "agent_id": "coder", "message": "one"})
            server.kill()
            write(tmp_path, {"agents": {"coder": {"system_prompt": "New."}}})
            server.start()
            answer = server.request("POST", "/chat", {"session_id": "a", "message": "two"}).body
            assert (answer["activation"], answer["turn_count"]) == ("restored", 2)
        prompts = [request["messages"][0]["content"] for request in model.requests()]
        assert prompts == ["Old.", "New."]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "AGENTS_FILE agents.json: cannot be read: No such file or directory"),
        ("{", "AGENTS_FILE agents.json: line 1 column 2: is not JSON"),
        (
            {"agents": {"a": {"api_key": CANARY}}},
            "AGENTS_FILE agents.json: agents.a.api_key: is not a known key",
        ),
        ({"agents": {"a": {"model": CANARY}}}, "AGENTS_FILE agents.json: agents.a.model: is not among"),
        (
            {"agents": {"a": {"tools": ["os:system"]}}},
            "AGENTS_FILE agents.json: agents.a.tools.0: is not in allowed_tools",
        ),
        (
            {"allowed_tools": ["breaks:now"], "agents": {"a": {"tools": ["breaks:now"]}}},
            "AGENTS_FILE agents.json: agents.a.tools.0: cannot be imported: RuntimeError",
        ),
    ],
)
def test_broken_file_stops_the_start_in_one_line(tmp_path, content, reason):
    """The process ends with one line: file, key and reason; no traceback, no value, no store."""
    if content is not None:
        write(tmp_path, content)
    (tmp_path / "breaks.py").write_text(f"raise RuntimeError({CANARY!r})\n")
    ended = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve", "--port", "0"],
        cwd=tmp_path,
        env=os.environ | {"MODEL_PROVIDER": "demo", "AGENTS_FILE": "agents.json"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"agentpool: {reason}")
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "canary" not in ended.stderr
    assert not (tmp_path / "agentpool.db").exists()
