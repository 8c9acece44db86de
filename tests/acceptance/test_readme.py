"""What README.md shows, run as it stands: only the port differs."""

import asyncio
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serverprocess import Reply, ServerProcess

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()
SETTINGS = {"store_url": "memory://", "model_provider": "demo"}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def curl_lines(text: str) -> list[str]:
    return [line for block in blocks("bash", text) for line in block.splitlines() if line.startswith("curl ")]


def curl(server: ServerProcess, line: str) -> Reply:
    """Do what the curl command does, on the test's server."""
    arguments = shlex.split(line)[1:]
    headers = dict(arguments[n + 1].split(": ", 1) for n, a in enumerate(arguments) if a == "-H")
    data = next((arguments[n + 1].encode() for n, a in enumerate(arguments) if a == "-d"), None)
    url = next(a for a in arguments if a.startswith("localhost:8000"))
    path = urlsplit(f"http://{url}").path
    return server.request("POST" if data else "GET", path, data, headers)


def test_curl_lines_work(server):
    """Each line answers 200 or 201, and the second one knows the name that the first one told."""
    replies = [curl(server, line) for line in curl_lines(README)]
    assert [reply.status for reply in replies] == [*[200] * 5, 201, 200, 200, 200, 201, 200, 200]
    assert "Alice" in replies[1].body["reply"]
    assert b"event: turn.finished" in replies[2].raw
    assert "张三" in replies[2].raw.decode()
    assert [m["role"] for m in replies[3].body["messages"]] == ["user", "assistant"] * 2
    assert replies[4].body["total_agents"] == 2
    checkpoint, bob, again, rewound, fork, note, events = (reply.body for reply in replies[5:])
    assert (
        checkpoint["turn_id"]
        == replies[1].body["turn_id"]
        == rewound["head"]
        == fork["head"]
        == note["turn_id"]
    )
    assert bob["turn_count"] == again["turn_count"] == 3
    assert "Alice" in note["summary"]
    assert [event["type"] for event in events["events"]][-2:] == ["head.moved", "session.compacted"]


def test_chinese_curl_lines_work(server):
    """The Chinese README's lines answer 200; the first session knows the name, the second one does not."""
    replies = [curl(server, line.replace("user_00", "zh_00")) for line in curl_lines(CHINESE)]
    assert [reply.status for reply in replies] == [200] * 5
    assert "张三" in replies[1].body["reply"]
    assert "张三" not in replies[2].raw.decode()


def test_program_without_http_runs(tmp_path):
    """The embedding program prints Alice's name and the events of a session that was never told one."""
    (program,) = [block for block in blocks("python") if "asyncio.run" in block]
    assert len([line for line in program.splitlines() if line.strip()]) <= 15
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Alice" in ended.stdout.splitlines()[0]
    assert ended.stdout.splitlines()[-1].startswith("TurnFinished(reply='我不知道你的名字")


def test_mounting_into_another_application_works(tmp_path):
    """The mounting example serves chat and stream under its path, and its docs know that path."""
    (example,) = [block for block in blocks("python") if "site.mount" in block]
    program = f"""{example}
import asyncio, json, socket, threading, urllib.request
import uvicorn

listener = socket.create_server(("127.0.0.1", 0))
url = f"http://127.0.0.1:{{listener.getsockname()[1]}}/assistant"
server = uvicorn.Server(uvicorn.Config(site, log_level="warning"))
thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
thread.start()

def post(path, **body):
    data, kind = json.dumps(body).encode(), {{"Content-Type": "application/json"}}
    with urllib.request.urlopen(urllib.request.Request(url + path, data, kind), timeout=30) as answer:
        return answer.read().decode(), dict(answer.headers)

try:
    post("/chat", session_id="s", message="My name is Alice")
    print(json.loads(post("/chat", session_id="s", message="What is my name?")[0])["reply"])
    print(post("/api/chat/stream", session_id="s", message="bye")[0].count("event: turn.finished"))
    print(post("/sessions", session_id="made")[1]["location"])
    with urllib.request.urlopen(url + "/docs", timeout=30) as answer:
        print("/assistant/openapi.json" in answer.read().decode())
finally:
    server.should_exit = True
    thread.join()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    name, finished, location, docs = ended.stdout.splitlines()
    assert "Alice" in name
    assert (finished, location, docs) == ("1", "/assistant/sessions/made", "True")


def test_names_are_loaded_lazily():
    """``import app`` loads neither FastAPI nor AutoGen nor pydantic."""
    program = (
        "import sys, app; "
        "print(sorted(m for m in ('fastapi', 'pydantic', 'autogen_core', 'apsw') if m in sys.modules)); "
        "print(all(getattr(app, name) for name in app.__all__))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines() == ["[]", "True"]


def test_backup_line_copies_a_store_in_use(tmp_path):
    """The backup command makes a copy that a server opens with every session in it."""
    (line,) = [li for block in blocks("bash") for li in block.splitlines() if "VACUUM INTO" in li]
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo", STORE_URL="sqlite:///./agentpool.db") as server:
        server.request("POST", "/chat", {"session_id": "kept", "message": "My name is Alice"})
        arguments = shlex.split(line)
        subprocess.run([sys.executable, *arguments[1:]], cwd=tmp_path, check=True, timeout=60)
    copy = ServerProcess(tmp_path, MODEL_PROVIDER="demo", STORE_URL="sqlite:///./agentpool-backup.db")
    with copy as server:
        reply = server.request("POST", "/chat", {"session_id": "kept", "message": "What is my name?"})
        assert "Alice" in reply.body["reply"]


@pytest.mark.parametrize(
    "name", ["AgentManager", "ChatService", "Runtime", "SessionManager", "Settings", "create_app"]
)
def test_embedders_names_are_documented(name):
    """Every exported name is in the README and has a docstring."""
    import app

    assert name in README
    assert getattr(app, name).__doc__


async def test_runtime_can_be_entered_by_any_program():
    """Two runtimes in one process keep their sessions apart."""
    from app import Runtime, Settings

    async with Runtime(Settings(**SETTINGS)) as one, Runtime(Settings(**SETTINGS)) as other:
        await asyncio.gather(one.chat.chat("s", "My name is Alice"), other.chat.chat("s", "My name is Bob"))
        assert "Alice" in (await one.chat.chat("s", "What is my name?")).reply
        assert "Bob" in (await other.chat.chat("s", "What is my name?")).reply
