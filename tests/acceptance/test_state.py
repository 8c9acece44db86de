"""State in prompts, as the model sees it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.modelserver import ModelServer
from tests.serverprocess import ServerProcess

PROMPT = "step {step}; name {user:name}; app {app:version}; {lang} {missing}."


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def server(tmp_path: Path, model: ModelServer) -> Iterator[ServerProcess]:
    model.reset()
    (tmp_path / "agents.json").write_text(json.dumps({"agents": {"coder": {"system_prompt": PROMPT}}}))
    settings = {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": model.base_url, "OPENAI_MODEL": "m"}
    with ServerProcess(tmp_path, AGENTS_FILE="agents.json", **settings) as process:
        yield process


class Prompts:
    """A session whose prompt names state of every scope, and what the model is told of it."""

    def __init__(self, server: ServerProcess, model: ModelServer) -> None:
        self.server = server
        self.model = model
        made = self.ask(
            "POST",
            "/sessions",
            {
                "session_id": "a",
                "user_id": "alice",
                "agent_id": "coder",
                "state": {"step": 0},
                "template": {"context": {"lang": "zh"}},
            },
        )
        assert made["session_id"] == "a"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        reply = self.server.request(method, path, body)
        assert reply.status in (200, 201), reply.body
        return reply.body

    def patch(self, path: str, state: dict[str, Any]) -> None:
        self.ask("PATCH", f"{path}/state", {"state": state})

    def chat(self, session_id: str = "a", **how: Any) -> tuple[str, str]:
        """Take a turn; return its id and the system prompt that the model was sent."""
        turn = self.ask("POST", "/chat", {"session_id": session_id, "message": "hi", **how})
        (prompt,) = [m for m in self.model.requests()[-1]["messages"] if m["role"] == "system"]
        return turn["turn_id"], prompt["content"]


def test_a_prompt_is_rendered_as_each_turn_starts(server, model):
    """Session, user and application state and the template's context; what is missing is empty."""
    talk = Prompts(server, model)
    assert talk.chat()[1] == "step 0; name ; app ; zh ."
    talk.patch("/users/alice", {"name": "{step}"})  # a value is no template
    talk.patch("/apps/default", {"version": {"major": 2}})
    assert talk.chat()[1] == 'step 0; name {step}; app {"major":2}; zh .'
    talk.patch("/sessions/a", {"step": "one", "lang": "en"})
    assert talk.chat()[1] == 'step one; name {step}; app {"major":2}; en .'
    talk.patch("/users/alice", {"name": None})
    assert talk.chat()[1] == 'step one; name ; app {"major":2}; en .'


def test_state_goes_back_with_its_branch_into_the_prompt(server, model):
    """After rewind, edit, restore, fork and another answer the model is told the state of that place."""
    talk = Prompts(server, model)
    ids = []
    for step in (1, 2, 3):
        talk.patch("/sessions/a", {"step": step})
        turn_id, prompt = talk.chat()
        assert prompt.startswith(f"step {step};")
        ids.append(turn_id)
    talk.patch("/users/alice", {"name": "Alice"})
    talk.patch("/sessions/a", {"step": "loose"})
    named = talk.ask("POST", "/sessions/a/checkpoints")
    talk.ask("POST", "/sessions/a/regenerate", {})
    assert talk.model.requests()[-1]["messages"][0]["content"].startswith("step loose;")
    talk.patch("/sessions/a", {"step": "looser"})
    turn_id, prompt = talk.chat(parent=ids[1])  # an edit
    assert prompt.startswith("step 2; name Alice;")
    talk.patch("/sessions/a", {"step": "again"})
    assert talk.chat(parent=turn_id)[1].startswith("step 2;")  # at the head, whose state has changed since
    talk.patch("/sessions/a", {"step": "later"})
    assert talk.chat()[1].startswith("step later;")
    talk.ask("POST", "/sessions/a/rewind", {"turn_id": ids[0]})
    assert talk.ask("GET", "/sessions/a/state")["state"] == {"step": 1}
    assert talk.chat()[1].startswith("step 1; name Alice;")
    talk.ask("POST", f"/sessions/a/checkpoints/{named['checkpoint_id']}/restore")
    assert talk.chat()[1].startswith("step loose;")
    fork = talk.ask("POST", "/sessions/a/fork", {"turn_id": ids[2]})["session_id"]
    assert talk.chat(fork)[1].startswith("step 3; name Alice;")
    assert talk.chat(parent="root")[1].startswith("step 0;")


def test_a_changed_template_counts_from_the_next_turn(server, model):
    """The prompt of the template goes before the profile's, and back when it is taken away."""
    talk = Prompts(server, model)
    talk.chat()
    talk.ask(
        "PATCH", "/sessions/a", {"template": {"system_prompt": "Speak {lang}.", "context": {"lang": "en"}}}
    )
    assert talk.chat()[1] == "Speak en."
    talk.ask("PATCH", "/sessions/a", {"template": None})
    assert talk.chat()[1] == "step 0; name ; app ;  ."
