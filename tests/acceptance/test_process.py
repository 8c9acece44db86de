"""The process as an operator sees it: start, kill, restart, stop, second start."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.modelserver import ModelServer
from tests.serverprocess import ServerProcess


def test_acknowledged_turns_survive_kill_and_the_conversation_goes_on(tmp_path):
    """After ``kill -9`` every answered turn is there, and the agent remembers what it was told."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        server.request("POST", "/chat", {"session_id": "a", "message": "My name is Alice"})
        server.request("POST", "/chat", {"session_id": "a", "message": "hello"})
        before = server.request("GET", "/sessions/a/history").body
        server.kill()
        server.start()
        assert server.request("GET", "/sessions/a/history").body == before
        answer = server.request("POST", "/chat", {"session_id": "a", "message": "What is my name?"}).body
        assert "Alice" in answer["reply"]
        assert (answer["activation"], answer["turn_count"]) == ("restored", 3)


def test_turn_that_died_with_its_process_is_failed_at_the_next_start(tmp_path):
    """A turn that ran at ``kill -9`` is recorded as failed, INTERRUPTED, and left no trace in the context."""
    with ModelServer() as model:
        settings = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": model.base_url, "OPENAI_MODEL": "m"}
        with ServerProcess(tmp_path, **settings) as server:
            server.request("POST", "/chat", {"session_id": "a", "message": "one"})
            model.script({"mode": "stall_mid", "text": "half an answer"})
            stream = server.stream("/chat/stream", {"session_id": "a", "message": "two"})
            events = iter(stream)
            started = next(events)
            assert next(events)["type"] == "text.delta"
            # A start record waits for a moment, but not once somebody has looked at the turn.
            assert server.request("GET", "/sessions/a/turns").body["turns"][0]["status"] == "running"
            server.kill()
            stream.close()
            server.start()
            turn = server.request("GET", f"/sessions/a/turns/{started['turn_id']}").body
            assert (turn["status"], turn["error"]["code"]) == ("failed", "INTERRUPTED")
            replayed = list(server.stream(f"/sessions/a/turns/{started['turn_id']}/stream", method="GET"))
            assert [event["type"] for event in replayed] == ["turn.started", "turn.failed"]
            answer = server.request("POST", "/chat", {"session_id": "a", "message": "three"}).body
            assert '"two"' not in answer["reply"]
            assert answer["turn_count"] == 2


def test_second_process_on_the_same_store_is_refused_in_one_line(tmp_path):
    """A second server on the same file says so and ends; the first goes on."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        second = subprocess.run(
            [sys.executable, "-m", "app.cli", "serve", "--port", "0"],
            cwd=tmp_path,
            env=os.environ | server.settings,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode == 1
        assert len(second.stderr.strip().splitlines()) == 1
        assert "Traceback" not in second.stderr
        assert server.request("GET", "/health").status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_the_running_turn_finish(tmp_path, number):
    """On SIGTERM and SIGINT a running turn ends as it would have, is committed, and the process ends."""
    with ModelServer() as model:
        settings = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": model.base_url, "OPENAI_MODEL": "m"}
        with ServerProcess(tmp_path, **settings) as server:
            model.script({"mode": "text", "text": "a slow answer", "chunks": 5, "delay_s": 0.2})
            stream = server.stream("/chat/stream", {"session_id": "a", "message": "hi"})
            events = iter(stream)
            next(events)
            os.kill(server.pid, number)
            assert list(events)[-1]["type"] == "turn.finished"
            assert server.wait() in (-number, 130)
            assert "Traceback" not in server.log()
            server.start()
            assert server.request("GET", "/sessions/a").body["turn_count"] == 1


def test_turn_that_outlasts_the_drain_is_cancelled_and_keeps_its_text(tmp_path):
    """With DRAIN_TIMEOUT_S over, the stream ends with ``turn.cancelled``, reason ``drain``, text kept."""
    with ModelServer() as model:
        settings = {
            "OPENAI_API_KEY": "k",
            "OPENAI_BASE_URL": model.base_url,
            "OPENAI_MODEL": "m",
            "DRAIN_TIMEOUT_S": "0.3",
        }
        with ServerProcess(tmp_path, **settings) as server:
            model.script({"mode": "stall_mid", "text": "half"})
            stream = server.stream("/chat/stream", {"session_id": "a", "message": "hi"})
            events = iter(stream)
            assert [next(events)["type"], next(events)["type"]] == ["turn.started", "text.delta"]
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            last = list(events)[-1]
            stopping.join()
            assert (last["type"], last["reason"], last["partial_kept"]) == ("turn.cancelled", "drain", True)
            server.start()
            history = server.request("GET", "/sessions/a/history").body["messages"]
            assert [m["content"] for m in history] == ["hi", "half"]
            assert history[-1]["interrupted"] is True


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [
        (["--port", "99999"], {}, "PORT"),
        (["--host", "0.0.0.0"], {}, "--insecure"),
        ([], {"STORE_URL": "mysql://u:canary@h/x"}, "sqlite:///"),
        ([], {"AGENT_MAX_INSTANCES": "0"}, "AGENT_MAX_INSTANCES"),
        ([], {"MODEL_PROVIDER": "zork"}, "MODEL_PROVIDER"),
        ([], {"STORE_URL": "sqlite:////nonexistent/folder/x.db"}, "folder"),
    ],
)
def test_wrong_setting_stops_the_start_in_one_line(tmp_path, arguments, settings, expected):
    """A wrong setting ends the start with one line that names it, no traceback and no secret."""
    ended = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve", *arguments],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode in (1, 2)
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "canary" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_name_that_was_made_to_point_here_reads_nothing(tmp_path):
    """With the defaults a page whose own name leads to this machine is refused; its own names are not."""
    with ServerProcess(tmp_path, MODEL_PROVIDER="demo") as server:
        server.request("POST", "/chat", {"session_id": "diary", "message": "My name is Alice"})
        port = server.url.rpartition(":")[2]
        foreign = {"Host": f"evil.example:{port}", "Sec-Fetch-Site": "same-origin"}
        answer = server.request("GET", "/sessions/diary/history", headers=foreign)
        assert (answer.status, answer.body["code"]) == (400, "MALFORMED_REQUEST")
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
            reply = server.request("GET", "/sessions/diary/history", headers={"Host": host})
            assert reply.status == 200
        assert server.request("GET", "/health", headers={"Host": "10.9.8.7"}).status == 200
