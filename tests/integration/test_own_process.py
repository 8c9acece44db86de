"""What only a process of its own shows: what it imports, and that it ends."""

import subprocess
import sys
from pathlib import Path

BLOCKED = """
import asyncio, threading
from app.agents.threads import ThreadTool
from app.agents.token import PruningToken

begun = threading.Event()

def block() -> str:
    begun.set()
    threading.Event().wait()

async def main() -> None:
    asyncio.get_running_loop().create_task(ThreadTool(block, "Block").run_json({}, PruningToken()))
    await asyncio.to_thread(begun.wait)

asyncio.run(main())
print("ended")
"""


def test_the_demo_does_not_pay_for_openai() -> None:
    """Importing the registry imports no client library, and the demo only what AutoGen needs."""
    code = """
import sys
from app.models.registry import ModelRegistry
from app.models.providers import demo_provider
assert not {"openai", "autogen_core", "aiohttp"} & set(sys.modules)
ModelRegistry([demo_provider()], "demo").client_for("demo", "demo", {})
assert not {"openai", "aiohttp"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nor_does_a_model_without_a_dialect() -> None:
    """Asking it, with tools, imports no client library; a model with one has it at the start."""
    code = """
import sys
from autogen_core.models import UserMessage
from app.agents.encoding import Conversation
from app.models.providers import make_provider
from app.models.registry import ModelRegistry
models = ModelRegistry([make_provider("x", base_url="http://localhost/v1", model="m")], "x")
models.preload()
asked = Conversation([UserMessage(content="q", source="user")], ())
assert models.client_for("x", "m", {})._body(asked, [{"name": "t"}], "auto", None, {})
assert not {"openai", "aiohttp"} & set(sys.modules)
ModelRegistry([make_provider("x", base_url="http://localhost/v1", model="claude-5")], "x").preload()
assert "openai" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_thread_that_blocks_does_not_keep_the_process(tmp_path: Path) -> None:
    """The program ends while a tool hangs for ever."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
