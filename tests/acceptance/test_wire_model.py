"""An OpenAI-compatible model over the wire: isolation and history proved at the model's end."""

import concurrent.futures
import json

import pytest

from tests.modelserver import ModelServer
from tests.serverprocess import ServerProcess

SESSIONS, TURNS, PLACES = 24, 6, 5


@pytest.fixture(scope="module", params=["lean", "stock"])
def pair(request, tmp_path_factory):
    with ModelServer() as model:
        settings = {
            "OPENAI_API_KEY": "sk-canary-000",
            "OPENAI_BASE_URL": model.base_url,
            "OPENAI_MODEL": "scripted",
            "MODEL_CLIENT": request.param,
            "AGENT_MAX_INSTANCES": str(PLACES),
        }
        with ServerProcess(tmp_path_factory.mktemp("server"), **settings) as server:
            yield server, model


def test_model_sees_exactly_each_sessions_own_history(pair):
    """24 sessions through 5 places: each request holds all turns of its own session and no other's."""
    server, model = pair
    model.reset()

    def converse(number):
        replies = []
        for turn in range(TURNS):
            body = {"session_id": f"wire-{number}", "message": f"s{number} t{turn}"}
            answer = server.request("POST", "/chat", body)
            assert answer.status == 200, answer.raw
            seen = json.loads(answer.body["reply"])
            own = [text for role, text in zip(seen["roles"], seen["texts"], strict=True) if role == "user"]
            assert own == [f"s{number} t{earlier}" for earlier in range(turn + 1)]
            assistant = [
                t for role, t in zip(seen["roles"], seen["texts"], strict=True) if role == "assistant"
            ]
            assert assistant == replies
            replies.append(answer.body["reply"])
            assert answer.body["usage"]["total_tokens"] > 0
        return answer.body["turn_count"]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(converse, range(SESSIONS))) == [TURNS] * SESSIONS
    stats = server.request("GET", "/agent-stats").body
    assert stats["total_agents"] <= PLACES
    assert stats["evictions"]["lru"] > 0
    assert stats["restores"] > 0
    assert len(model.requests()) == SESSIONS * TURNS


def test_failed_turn_leaves_no_trace_at_the_models_end(pair):
    """After a failure the next request holds what it would have held without it."""
    server, model = pair
    model.reset()
    send = {"session_id": "failing", "message": "first"}
    server.request("POST", "/chat", send)
    model.script({"mode": "status", "status": 400})
    failed = server.request("POST", "/chat", send | {"message": "lost"})
    assert (failed.status, failed.body["code"]) == (502, "MODEL_ERROR")
    assert "canary" not in failed.raw.decode()
    answer = server.request("POST", "/chat", send | {"message": "second"})
    seen = json.loads(answer.body["reply"])
    assert "lost" not in seen["texts"]
    assert seen["texts"][-1] == "second"
    assert answer.body["turn_count"] == 2
    statuses = [t["status"] for t in server.request("GET", "/sessions/failing/turns").body["turns"]]
    assert statuses == ["finished", "failed", "finished"]


def test_model_choice_sticks_and_unknown_ones_are_refused(pair):
    """A model that is not offered is 422 UNKNOWN_MODEL and makes no session."""
    server, _ = pair
    refused = server.request("POST", "/chat", {"session_id": "m1", "message": "hi", "model": "other"})
    assert (refused.status, refused.body["code"]) == (422, "UNKNOWN_MODEL")
    assert server.request("GET", "/sessions/m1").status == 404


def test_key_is_in_no_log(pair):
    """After all of this the API key stands in no line of the log."""
    server, _ = pair
    assert "canary" not in server.log()
