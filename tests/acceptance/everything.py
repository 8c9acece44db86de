"""A server that is used in every way that leaves something in its store, and all that it says then."""

from typing import Any

from tests.serverprocess import ServerProcess

READS = (
    "/sessions/a", "/sessions/a/history", "/sessions/a/turns", "/sessions/a/events", "/sessions/a/state",
    "/sessions/a/checkpoints", "/sessions/a/history?limit=1", "/sessions/b", "/sessions/b/history",
    "/sessions/b/state", "/sessions/fork", "/sessions/fork/history", "/sessions/fork/turns",
    "/sessions/gone", "/users/u/usage", "/users/u/state", "/sessions?user_id=u", "/sessions/stats",
)  # fmt: skip


def reads(server: ServerProcess) -> dict[str, tuple[int, Any]]:
    """Return what the server says of everything, without what differs from one answer to the next."""
    found = {}
    for path in READS:
        reply = server.request("GET", path)
        body = reply.body
        for changing in ("request_id", "next_cursor"):
            body.pop(changing, None)
        found[path] = reply.status, body
    return found


def live(server: ServerProcess) -> list[tuple[str, str, dict[str, Any], dict[str, str]]]:
    """Use everything that leaves something in the store; return what was sent with a key."""
    keyed = []
    for number, text in enumerate(("My name is Alice", "hello", "one more \u2028 🦊")):
        body = {"session_id": "a", "user_id": "u", "message": text}
        keyed.append(("POST", "/chat", body, {"Idempotency-Key": f"k{number}"}))
        assert server.request(*keyed[-1]).status == 200
        patch = {"state": {"step": number, "odd": {"": [None, 1.5, 2**50]}}}
        assert server.request("PATCH", "/sessions/a/state", patch).status == 200
        if number == 1:
            named = server.request("POST", "/sessions/a/checkpoints", {"label": "two", "data": {"x": 1}})
            assert named.status == 201
    for path, sent in (
        ("/sessions/a/compact", {}),
        ("/sessions/a/fork", {"session_id": "fork"}),
        ("/sessions/a/regenerate", {}),
        ("/sessions/a/rewind", {"turns": 1}),
        (f"/sessions/a/checkpoints/{named.body['checkpoint_id']}/restore", {}),
        ("/chat", {"session_id": "b", "user_id": "u", "message": "I am Bob"}),
        ("/sessions", {"session_id": "gone", "user_id": "u"}),
    ):
        assert server.request("POST", path, sent).status in (200, 201), path
    assert server.request("PATCH", "/users/u/state", {"state": {"likes": "tea"}}).status == 200
    assert server.request("PATCH", "/sessions/b", {"status": "archived", "title": "您好"}).status == 200
    assert server.request("DELETE", "/sessions/gone").status == 200
    return keyed
