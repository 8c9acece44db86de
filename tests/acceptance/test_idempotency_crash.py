"""Idempotency keys over a crash: the answer is stored with its key or not at all."""

from concurrent.futures import ThreadPoolExecutor

from tests.modelserver import ModelServer
from tests.serverprocess import ServerProcess

KEY = {"Idempotency-Key": "k"}


def settings_for(model: ModelServer) -> dict[str, str]:
    return {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": model.base_url, "OPENAI_MODEL": "m"}


def test_one_turn_before_and_after_a_crash(tmp_path):
    """Twenty equal requests, ``kill -9``, and the same ones again: one call of the model, one answer."""
    body = {"message": "hello"}
    with ModelServer() as model, ServerProcess(tmp_path, **settings_for(model)) as server:

        def ask(path: str):
            if path == "/chat":
                return server.request("POST", path, body, KEY).body
            return list(server.stream(path, body, headers=KEY))

        with ThreadPoolExecutor(20) as threads:
            before = list(threads.map(ask, ["/chat", "/chat/stream"] * 10))
        server.kill()
        server.start()
        plain, streams = before[::2], before[1::2]
        assert all(answer == plain[0] for answer in (*plain, ask("/chat")))
        for events in (*streams, ask("/chat/stream")):
            assert events[-1] == streams[0][-1]
            text = "".join(event["text"] for event in events if event["type"] == "text.delta")
            assert text == plain[0]["reply"]
        assert model.stats()["requests"] == 1
        other = server.request("POST", "/chat", {"message": "other"}, KEY)
        assert (other.status, other.body["code"]) == (422, "IDEMPOTENCY_MISMATCH")
        other = server.request("POST", "/chat", body | {"session_id": plain[0]["session_id"]}, KEY)
        assert other.status == 422
        assert server.request("GET", "/sessions").body["total"] == 1


def test_a_turn_that_died_releases_its_key(tmp_path):
    """A turn that ran at ``kill -9`` has no outcome: its repeat runs, or another request with the key."""
    with ModelServer() as model, ServerProcess(tmp_path, **settings_for(model)) as server:
        for session_id in ("a", "b"):
            model.script({"mode": "stall_mid", "text": "half"})
            body = {"session_id": session_id, "message": "hello"}
            stream = server.stream("/chat/stream", body, headers=KEY | {"Idempotency-Key": session_id})
            events = iter(stream)
            started = next(events)
            assert next(events)["type"] == "text.delta"
            # A start record waits for a moment, but not once somebody has looked at the turn.
            shown = server.request("GET", f"/sessions/{session_id}/turns/{started['turn_id']}").body
            assert shown["status"] == "running"
            server.kill()
            stream.close()
            server.start()
            turn = server.request("GET", f"/sessions/{session_id}/turns/{started['turn_id']}").body
            assert turn["error"]["code"] == "INTERRUPTED"
        same = {"session_id": "a", "message": "hello"}
        again = server.request("POST", "/chat", same, {"Idempotency-Key": "a"})
        assert (again.status, again.body["turn_count"]) == (200, 1)
        repeat = server.request("POST", "/chat", same, {"Idempotency-Key": "a"})
        assert repeat.body == again.body
        other = server.request("POST", "/chat", {"message": "another"}, {"Idempotency-Key": "b"})
        assert other.status == 200


def test_a_kept_cancel_survives_a_crash(tmp_path):
    """A turn that was cancelled and kept is answered as cancelled by the next process, too."""
    with ModelServer() as model, ServerProcess(tmp_path, **settings_for(model)) as server:
        model.script({"mode": "stall_mid", "text": "half"})
        body = {"session_id": "a", "message": "hello"}
        stream = server.stream("/chat/stream", body, headers=KEY)
        events = iter(stream)
        started = next(events)
        next(events)
        server.request("POST", "/sessions/a/cancel", {})
        assert list(events)[-1]["type"] == "turn.cancelled"
        server.kill()
        server.start()
        again = server.request("POST", "/chat", body, KEY)
        assert (again.status, again.body["code"]) == (409, "TURN_CANCELLED")
        assert again.body["turn_id"] == started["turn_id"]
        stored = list(server.stream("/chat/stream", body, headers=KEY))
        assert [event["type"] for event in stored] == ["turn.started", "text.delta", "turn.cancelled"]
        assert model.stats()["requests"] == 1
