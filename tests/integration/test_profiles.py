"""Profiles from a file, as clients and the model see them."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_http_server import HttpServer, problem
from tests.modelserver import ModelServer

MODULE = "profile_tools_of_http"
TOOLS = '''
async def now() -> str:
    """Tell the time."""
    return "noon"

async def never() -> str:
    """Never be offered."""
    return ""
'''
CODER = {
    "name": "Coder",
    "description": "Writes code.",
    "system_prompt": "You write code.",
    "model": "special",
    "params": {"temperature": 0.5, "seed": 7},
    "tools": [f"{MODULE}:now"],
}

Json = dict[str, Any]
Serve = Callable[..., HttpServer]


@pytest.fixture(scope="module")
def model_server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def model(model_server: ModelServer) -> ModelServer:
    model_server.reset()
    return model_server


@pytest.fixture
def serve(model: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Return what makes a server on one store with the given agents in its file."""
    (tmp_path / f"{MODULE}.py").write_text(TOOLS)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def serve(agents: Json, **settings: Any) -> HttpServer:
        content = {"allowed_tools": [f"{MODULE}:now", f"{MODULE}:never"], "agents": agents}
        (tmp_path / "agents.json").write_text(json.dumps(content))
        values = {
            "store_url": f"sqlite:///{tmp_path / 'pool.db'}",
            "model_provider": "openai",
            "openai_api_key": "k",
            "openai_base_url": model.base_url,
            "openai_model": "m",
            "openai_models": ("special", "other"),
            "agents_file": str(tmp_path / "agents.json"),
        }
        return HttpServer(**{**values, **settings})

    yield serve
    sys.modules.pop(MODULE, None)


def chat(server: HttpServer, message: str, **body: Any) -> Json:
    answer = server.client.post("/chat", json={"session_id": "s", "message": message, **body})
    assert answer.status_code == 200, answer.text
    document: Json = answer.json()
    return document


def sent(request: Json) -> list[str]:
    return [f"{message['role']} {message['content']}" for message in request["messages"]]


def test_the_model_gets_what_the_profile_says(serve: Serve, model: ModelServer) -> None:
    """Prompt, model, params and tools of the profile, and no others."""
    model.script({"mode": "text", "text": "fine"})
    with serve({"coder": CODER}) as server:
        answer = chat(server, "hi", agent_id="coder")
    (request,) = model.requests()
    assert (answer["agent_id"], answer["model"], request["model"]) == ("coder", "special", "special")
    assert sent(request) == ["system You write code.", "user hi"]
    assert (request["temperature"], request["seed"]) == (0.5, 7)
    assert [tool["function"]["name"] for tool in request["tools"]] == ["now"]


def test_a_session_overrides_its_profile(serve: Serve, model: ModelServer) -> None:
    """Its own params one by one, and its own model; the profile's come back when it lets go of them."""
    model.script({"mode": "text", "text": "fine", "repeat": 2})
    with serve({"coder": CODER}) as server:
        chat(server, "hi", agent_id="coder", model="other", params={"temperature": 0.1})
        assert server.client.patch("/sessions/s", json={"params": None, "model": None}).status_code == 200
        chat(server, "hi")
    own, back = model.requests()
    assert (own["model"], own["temperature"], own["seed"]) == ("other", 0.1, 7)
    assert (back["model"], back["temperature"], back["seed"]) == ("special", 0.5, 7)


def test_a_tool_from_the_file_is_called(serve: Serve, model: ModelServer) -> None:
    """What it returns is what the model is told."""
    call = {"name": "now", "arguments": "{}", "id": "c"}
    model.script({"mode": "tools", "calls": [call]}, {"mode": "text", "text": "It is noon."})
    with serve({"coder": CODER}) as server:
        assert chat(server, "What time is it?", agent_id="coder")["reply"] == "It is noon."
    assert model.requests()[1]["messages"][-1]["content"] == "noon"


def test_a_profile_bounds_the_rounds_of_tool_calls(serve: Serve, model: ModelServer) -> None:
    """After so many the model is asked for words, without tools."""
    call = {"name": "now", "arguments": "{}", "id": "c"}
    model.script(
        {"mode": "tools", "calls": [call], "repeat": 2, "rounds": 9}, {"mode": "text", "text": "Noon."}
    )
    with serve({"coder": {**CODER, "max_tool_iterations": 2}}) as server:
        assert chat(server, "What time is it?", agent_id="coder")["reply"] == "Noon."
    assert [bool(request.get("tools")) for request in model.requests()] == [True, True, False]


def test_a_policy_chooses_what_is_sent_and_nothing_else(serve: Serve, model: ModelServer) -> None:
    """``last:4`` sends the last turn and the new message; history and counts are whole."""
    model.script({"mode": "text", "text": "fine", "repeat": 4})
    with serve({"coder": {"system_prompt": "P", "context_policy": "last:4"}}) as server:
        answers = [chat(server, f"q{n}", agent_id="coder") for n in range(4)]
        history = server.client.get("/sessions/s/history").json()["messages"]
    assert sent(model.requests()[1]) == ["system P", "user q0", "assistant fine", "user q1"]
    assert sent(model.requests()[3]) == ["system P", "user q2", "assistant fine", "user q3"]
    assert answers[-1]["message_count"] == len(history) == 8


def test_a_restored_agent_is_shown_what_a_live_one_is(serve: Serve, model: ModelServer) -> None:
    """The policy of the server holds for profiles without one, and cuts a restored path alike."""
    model.script({"mode": "text", "text": "fine", "repeat": 5})
    with serve({"coder": {"system_prompt": "P"}}, context_policy="tokens:15") as server:
        for n in range(3):
            chat(server, f"q{n}", agent_id="coder")
        assert server.client.delete("/agent-sessions/s").status_code == 200
        assert chat(server, "q3")["activation"] == "restored"
    assert sent(model.requests()[2]) == ["system P", "user q1", "assistant fine", "user q2"]
    assert sent(model.requests()[3]) == ["system P", "user q2", "assistant fine", "user q3"]


def test_a_changed_file_counts_after_a_restart(serve: Serve, model: ModelServer) -> None:
    """A session from before is restored with its messages and the new prompt, model and tools."""
    model.script({"mode": "text", "text": "fine", "repeat": 2})
    with serve({"coder": CODER}) as server:
        chat(server, "one", agent_id="coder")
    with serve({"coder": {"system_prompt": "You sing."}}) as server:
        assert chat(server, "two")["activation"] == "restored"
    request = model.requests()[1]
    assert sent(request) == ["system You sing.", "user one", "assistant fine", "user two"]
    assert (request["model"], "tools" in request, "seed" in request) == ("m", False, False)


def test_a_profile_that_is_gone_is_not_found(serve: Serve, model: ModelServer) -> None:
    """Its sessions stay, can be read, and go on when the file has it again."""
    model.script({"mode": "text", "text": "fine", "repeat": 2})
    with serve({"coder": CODER}) as server:
        chat(server, "one", agent_id="coder")
    with serve({"writer": {}}) as server:
        refused = server.client.post("/chat", json={"session_id": "s", "message": "two"})
        problem(refused, 404, "AGENT_NOT_FOUND")
        assert server.client.get("/sessions/s").json()["agent_id"] == "coder"
    with serve({"coder": CODER}) as server:
        assert chat(server, "two")["turn_count"] == 2


def test_a_session_goes_on_with_another_profile(serve: Serve, model: ModelServer) -> None:
    """One whose profile or model is gone goes on once it names another, and that sticks."""
    model.script({"mode": "text", "text": "fine", "repeat": 4})
    with serve({"coder": CODER}) as server:
        chat(server, "one", agent_id="coder")
    with serve({"writer": {}}) as server:
        assert chat(server, "two", agent_id="writer")["agent_id"] == "writer"
        assert chat(server, "three")["turn_count"] == 3
        assert server.client.get("/sessions/s").json()["agent_id"] == "writer"


def test_profiles_are_listed(serve: Serve) -> None:
    """The built-in one and those of the file; prompts and import paths are not shown."""
    with serve({"coder": CODER, "writer": {}}) as server:
        answer = server.client.get("/agents")
    assistant, coder, writer = answer.json()["agents"]
    assert (assistant["agent_id"], writer["agent_id"], writer["name"]) == ("assistant", "writer", "writer")
    expected = {
        "agent_id": "coder",
        "name": "Coder",
        "description": "Writes code.",
        "provider": None,
        "model": "special",
        "tools": ["now"],
    }
    assert expected.items() <= coder.items()
    assert answer.json()["total"] == 3
    assert "You write code" not in answer.text
    assert MODULE not in answer.text


@pytest.mark.parametrize(("method", "path"), [("POST", "/chat"), ("POST", "/sessions")])
def test_an_unknown_agent_is_not_found(serve: Serve, model: ModelServer, method: str, path: str) -> None:
    """It is refused before a session is made or the model asked."""
    body = {"session_id": "s", "agent_id": "nobody"} | ({"message": "hi"} if path == "/chat" else {})
    with serve({"coder": CODER}) as server:
        problem(server.client.request(method, path, json=body), 404, "AGENT_NOT_FOUND")
        assert server.client.get("/sessions/s").status_code == 404
    assert model.requests() == []
