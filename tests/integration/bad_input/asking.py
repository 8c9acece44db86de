"""What tests of bad input share: a server behind each HTTP parser, its routes, and any request to them."""

import contextlib
import http.client
import json
import socket
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

from app.api.protocol import PushingProtocol
from app.api.safety import DEFAULTS
from app.config import Settings
from app.main import create_app
from tests.integration.test_http_server import HttpServer

CANARY = "canary-7f3a"
ANSWER_S = 5.0
TURN = "0199c1f2-7d1a-7b3e-8c55-3f0e9d2b6a11"
PARSERS = {"httptools": PushingProtocol, "h11": "h11"}
ARGUMENTS = {
    "session_id": "s",
    "turn_id": TURN,
    "checkpoint_id": TURN,
    "user_id": "u",
    "app_name": "default",
    "agent_id": "assistant",
}
BODIES: dict[str, dict[str, Any]] = {
    "/chat": {"session_id": "s", "message": "x"},
    "/chat/stream": {"session_id": "s", "message": "x"},
    "/sessions/resume": {"user_id": "u"},
    "/sessions/batch": {"sessions": []},
    "/sessions/batch-delete": {"session_ids": []},
    "/sessions/{session_id}/rewind": {"turns": 1},
    "/apps/{app_name}/state": {"state": {}},
    "/users/{user_id}/state": {"state": {}},
    "/sessions/{session_id}/state": {"state": {}},
}
"""The smallest body that fits, where that is not an empty object."""


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    names: frozenset[str]  # of the parameters in its path
    queries: frozenset[str] = field(repr=False)
    fields: frozenset[str] = field(repr=False)  # of its body

    def at(self, **arguments: str) -> str:
        return self.path.format(**ARGUMENTS | arguments)

    @property
    def has_body(self) -> bool:
        return bool(self.fields)

    @property
    def body(self) -> dict[str, Any] | None:
        return BODIES.get(self.path, {}) if self.has_body else None


@cache
def routes() -> tuple[Route, ...]:
    """Return every route of the schema."""
    schema = create_app(Settings(store_url="memory://", model_provider="demo")).openapi()
    return tuple(
        Route(
            method.upper(),
            path,
            frozenset(p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"),
            frozenset(p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"),
            frozenset(_fields_of(operation, schema)),
        )
        for path, item in schema["paths"].items()
        for method, operation in item.items()
    )


def _fields_of(operation: dict[str, Any], schema: dict[str, Any]) -> set[str]:
    body = operation.get("requestBody", {"content": {}})["content"].get("application/json", {"schema": {}})[
        "schema"
    ]
    found: set[str] = set()
    for part in (body, *body.get("anyOf", ())):
        name = part.get("$ref", "").rpartition("/")[2]
        found |= set(schema["components"]["schemas"][name]["properties"]) if name else set()
    return found


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        """Return the problem document, having checked that it is a whole one and tells nothing."""
        assert self.headers["content-type"] == "application/problem+json"
        document: dict[str, Any] = json.loads(self.body)
        assert document["status"] == self.status
        assert document["type"] == "/problems/" + document["code"].lower().replace("_", "-")
        assert document["request_id"] == self.headers["x-request-id"]
        assert document["title"]
        assert document["detail"]
        assert document["instance"]
        for error in document.get("errors", ()):
            assert set(error) == {"field", "message"}
        for name, value in DEFAULTS:
            assert self.headers[name.decode()] == value.decode()
        for telltale in (CANARY, "Traceback", ".py", "pydantic"):
            assert telltale not in self.body.decode()
        return document


class Asked:
    """A server with one session ``s`` of the user ``u``, and a turn in it."""

    def __init__(self, parser: str, **settings: Any) -> None:
        self.parser = parser
        self._server = HttpServer(http=PARSERS[parser], **settings)

    def __enter__(self) -> Self:
        self._server.__enter__()
        for path, body in (
            ("/chat", {"session_id": "s", "user_id": "u", "message": "hello"}),
            ("/sessions/s/checkpoints", {}),
        ):
            assert self._server.client.post(path, json=body).status_code < 300
        self.before = self.stored()
        self.turn_id: str = self.before[2]["turns"][0]["turn_id"]
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(*error)

    def stored(self) -> list[Any]:
        """Return all that a client can see of what is stored; whether an agent lives is not."""
        paths = ("/sessions", "/sessions/s/history", "/sessions/s/turns", "/sessions/s/checkpoints",
                 "/sessions/s/state", "/users/u/state", "/apps/default/state")  # fmt: skip
        texts = [self._server.client.get(path).text for path in paths]
        return [json.loads(text.replace('"live":true', '"live":false')) for text in texts]

    def send(self, *pieces: bytes, method: str = "GET") -> Answer:
        """Send the bytes, as far as the server takes them, and return the answer, which comes in time."""
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", self._server.port), timeout=ANSWER_S) as connection:
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    connection.sendall(piece)
            response = http.client.HTTPResponse(connection, method=method)
            try:
                response.begin()
                answer = Answer(
                    response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
                )
            finally:
                response.close()
        assert time.monotonic() - began < ANSWER_S
        return answer

    def ask(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: dict[str, str | bytes] | None = None,
        *,
        is_json: bool = True,
    ) -> Answer:
        """Send one request, exactly as it is given."""
        fields: dict[str, str | bytes] = {"Host": "x", "Connection": "close"}
        if body is not None:
            fields["Content-Length"] = str(len(body))
            if is_json:
                fields["Content-Type"] = "application/json"
        lines = [f"{method} {target} HTTP/1.1".encode()]
        for name, value in (fields | (headers or {})).items():
            lines.append(name.encode() + b": " + (value if isinstance(value, bytes) else value.encode()))
        return self.send(b"\r\n".join(lines) + b"\r\n\r\n" + (body or b""), method=method)

    def refused(self, status: int, code: str, answer: Answer) -> dict[str, Any]:
        """Check that it was refused so, and return the problem document."""
        document = answer.problem
        assert (answer.status, document["code"]) == (status, code)
        return document
