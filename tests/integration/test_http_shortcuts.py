"""Routes with a shortcut answer as they would without it."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from app.api import route
from tests.integration.test_http_server import HttpServer

_OF_ONE_REQUEST = re.compile(
    r"[0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f-]{27}|[0-9-]{10}T[0-9:.]+Z|\w{3}, [^\"]+ GMT|_ms\": ?\d+"
)


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with HttpServer() as running:
        yield running


def answer(server: HttpServer, path: str, body: Any, headers: dict[str, str]) -> tuple[int, str, str]:
    """Return a response to the first message of a session, without what no other one has in it."""
    server.client.delete("/sessions/same")
    response = server.client.post(path, json=body, headers=headers)
    return (
        response.status_code,
        _OF_ONE_REQUEST.sub("…", repr(response.headers.multi_items())),
        _OF_ONE_REQUEST.sub("…", response.text),
    )


@pytest.mark.parametrize("path", ["/chat", "/chat/stream", "/api/chat", "/chat?a=1", "/chat?a=%ff", "/chat/"])
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"session_id": "same", "message": "hello"}, {}),
        ({"conversation_id": "same", "message": "你好", "params": {"temperature": 0.5}}, {}),
        ({"session_id": "same", "message": "hello", "on_busy": "reject", "metadata": {"token": "t"}}, {}),
        ({"session_id": "same", "message": "hello"}, {"If-Match": '"x.1"'}),
        ({"session_id": "same", "message": "hello"}, {"If-Match": '"0.1", "0.2"'}),
        ({"session_id": "same", "message": "hello"}, {"Idempotency-Key": "k" * 300}),
        ({"session_id": "same", "message": " "}, {}),
        ({"session_id": "same", "message": ""}, {}),
        ({"session_id": "same", "message": "hello", "model": "none of ours"}, {}),
        ({"session_id": "a b", "message": "hello", "params": {"temperature": "hot"}, "other": 1}, {}),
        ({"session_id": "same", "conversation_id": "other", "message": "hello"}, {}),
        ({}, {}),
        ([], {}),
        ("message", {}),
        (None, {}),
    ],
)
def test_nobody_can_tell(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, headers: dict[str, str]
) -> None:
    """Status, headers and body are the same, whatever the request is."""
    short = answer(server, path, body, headers)
    monkeypatch.setattr(route, "_SHORTCUTS", {})
    assert short == answer(server, path, body, headers)


def test_a_shortcut_is_taken(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request without a fault does not come to FastAPI's own handling."""

    async def handle(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(route.APIRoute, "handle", handle)
    for path in ("/chat", "/agent_backend/chat", "/chat/stream"):
        assert server.client.post(path, json={"message": "hello"}).status_code == 200
    assert server.client.post("/chat", json={}).status_code == 500
